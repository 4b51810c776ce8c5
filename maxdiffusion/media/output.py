"""The files of one batch of videos: names held from the first write to the last, latents first, the record last."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from maxdiffusion.config import Config
from maxdiffusion.config.examples import Example, alone
from maxdiffusion.errors import UserError
from maxdiffusion.media import manifest, naming
from maxdiffusion.media.sidecar import write_sidecar
from maxdiffusion.media.write import FORMATS, write
from maxdiffusion.runtime import distributed
from maxdiffusion.runtime.paths import AnyPath, parse
from maxdiffusion.runtime.progress import Advance
from maxdiffusion.weights.latents_io import save_latents

log = logging.getLogger(__name__)


class Output:
    """Where the videos of one batch go; made by `reserved`. Of several processes the first writes, for all of them."""

    def __init__(self, cfg: Config, examples: Sequence[Example], stems: Sequence[AnyPath]) -> None:
        self._cfg = cfg
        self._examples = examples
        self._stems = stems
        self._overwrite = _overwrites(cfg)
        self.paths = [naming.sibling(stem, FORMATS[cfg.output_format].suffix) for stem in stems]

    def write(self, clips: UInt8[np.ndarray, "b f h w c"], advance: Advance) -> list[AnyPath]:
        """Encodes each video in turn and returns their paths; `advance` is told of each."""
        distributed.first(lambda: self._write(clips, advance))
        return self.paths

    def _write(self, clips: np.ndarray, advance: Advance) -> None:
        cfg = self._cfg
        for path, clip, example in zip(self.paths, clips, self._examples, strict=True):
            write(clip, path, cfg.fps, cfg.output_format, _told(cfg, example), self._overwrite)
            advance(1)
            log.info("wrote %s", path)

    def record(self, versions: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        """`<stem>.json` beside each video."""
        distributed.first(lambda: self._record(versions, timings))

    def _record(self, versions: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        for stem, path, example in zip(self._stems, self.paths, self._examples, strict=True):
            write_sidecar(
                naming.sibling(stem, naming.RECORD),
                config=(alone(self._cfg, example) if self._cfg.prompts else self._cfg).to_json(),
                seed=example.seed,
                versions=versions,
                timings=timings,
                output=path,
                overwrite=self._overwrite,
            )
        if self._cfg.prompts:
            manifest.finish(self._cfg, self._examples)


@contextlib.contextmanager
def reserved(cfg: Config, examples: Sequence[Example], latents: Float[np.ndarray, "b f h w c"]) -> Iterator[Output]:
    """Holds a name for each video: `save_file` or that of a prompt file's line to the letter, or a readable one below
    output_dir/run_name. Saves `<stem>.latents.safetensors` of each at once: what a later failure cannot lose.

    Raises:
      UserError: the folder cannot be written, or a named file has come meanwhile or is made by another run; the latents
        then lie under a free name beside it.
    """

    def hold_and_save() -> list[str]:
        try:
            with contextlib.ExitStack() as attempt:
                stems = _hold(cfg, examples, attempt)
                hold.push(attempt.pop_all())
        except UserError as error:
            raise UserError(f"{error}{_elsewhere(cfg, examples, latents)}") from None
        _save(cfg, examples, latents, stems)
        return list(map(str, stems))

    with contextlib.ExitStack() as hold:
        stems = distributed.first(hold_and_save)
        yield Output(cfg, examples, [parse(stem) for stem in stems])


def _save(cfg: Config, examples: Sequence[Example], latents: np.ndarray, stems: Sequence[AnyPath]) -> None:
    if cfg.decode_latents:  # they lie in the file that was given
        return
    for stem, one, example in zip(stems, latents, examples, strict=True):
        save_latents(naming.sibling(stem, naming.LATENTS), one[None], _told(cfg, example), _overwrites(cfg))


def _elsewhere(cfg: Config, examples: Sequence[Example], latents: np.ndarray) -> str:
    """Saves latents whose videos' own names cannot be had; where they are, for the message."""
    named, own = _named(cfg, examples), FORMATS[cfg.output_format].suffix
    if cfg.decode_latents or not named:  # names made from prompts are free ones already
        return ""
    with contextlib.ExitStack() as hold:
        try:
            free = [naming.reserve(one.parent, one.name[: len(one.name) - len(own)]) for one in named]
            stems = [hold.enter_context(one) for one in free]
            _save(cfg, examples, latents, stems)
        except UserError:  # the first one says it all
            return ""
        kept = ", ".join(str(naming.sibling(stem, naming.LATENTS)) for stem in stems)
    return f"; what was denoised is kept: decode_latents={kept} makes the video of it"


def _told(cfg: Config, example: Example) -> dict[str, str]:
    told = {"seed": str(example.seed)}
    return {"prompt": example.prompt, **told} if cfg.save_prompt_in_metadata else told


def _overwrites(cfg: Config) -> bool:
    return cfg.overwrite or cfg.prompts is not None  # the manifest told that they are ours


def _named(cfg: Config, examples: Sequence[Example]) -> list[AnyPath]:
    """The files that the user named."""
    if cfg.prompts is not None:
        return [manifest.video_path(cfg, example) for example in examples]
    return [] if cfg.save_file is None else [parse(cfg.save_file)]


def _hold(cfg: Config, examples: Sequence[Example], hold: contextlib.ExitStack) -> list[AnyPath]:
    if cfg.prompts is not None:
        suffixes = (FORMATS[cfg.output_format].suffix, naming.RECORD, naming.LATENTS)
        named = _named(cfg, examples)
        stems = [hold.enter_context(naming.reserve_file(final, suffixes, overwrite=True)) for final in named]
        manifest.begin(cfg, examples)
        return stems
    if cfg.save_file is None:
        return [hold.enter_context(_named_by_prompt(cfg, example)) for example in examples]
    besides = (naming.RECORD,) if cfg.decode_latents else (naming.RECORD, naming.LATENTS)
    suffixes = (FORMATS[cfg.output_format].suffix, *besides)
    return [hold.enter_context(naming.reserve_file(parse(cfg.save_file), suffixes, cfg.overwrite))]


def _named_by_prompt(cfg: Config, example: Example) -> contextlib.AbstractContextManager[AnyPath]:
    words = example.prompt if cfg.save_prompt_in_metadata else ""
    stem = naming.default_stem(words, example.seed, example.width, example.height, cfg.num_frames)
    return naming.reserve(parse(cfg.output_dir) / cfg.run_name, stem)
