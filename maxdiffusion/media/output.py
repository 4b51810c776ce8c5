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
        self._overwrite = cfg.overwrite or cfg.prompts is not None  # the manifest told that they are ours
        self.paths = [naming.sibling(stem, FORMATS[cfg.output_format].suffix) for stem in stems]

    def save_latents(self, latents: Float[np.ndarray, "b f h w c"]) -> None:
        """One `<stem>.latents.safetensors` for each video, before the VAE runs: what a later failure cannot lose."""
        if self._cfg.decode_latents:  # they lie in the file that was given
            return
        distributed.first(lambda: self._save_latents(latents))

    def _save_latents(self, latents: np.ndarray) -> None:
        for stem, one, example in zip(self._stems, latents, self._examples, strict=True):
            save_latents(naming.sibling(stem, naming.LATENTS), one[None], self._told(example), self._overwrite)

    def write(self, clips: UInt8[np.ndarray, "b f h w c"], advance: Advance) -> list[AnyPath]:
        """Encodes each video in turn and returns their paths; `advance` is told of each."""
        distributed.first(lambda: self._write(clips, advance))
        return self.paths

    def _write(self, clips: np.ndarray, advance: Advance) -> None:
        cfg = self._cfg
        for path, clip, example in zip(self.paths, clips, self._examples, strict=True):
            write(clip, path, cfg.fps, cfg.output_format, self._told(example), self._overwrite)
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

    def _told(self, example: Example) -> dict[str, str]:
        told = {"seed": str(example.seed)}
        return {"prompt": example.prompt, **told} if self._cfg.save_prompt_in_metadata else told


@contextlib.contextmanager
def reserved(cfg: Config, examples: Sequence[Example]) -> Iterator[Output]:
    """Holds a name for each video: `save_file` or that of a prompt file's line to the letter, or a readable one below
    output_dir/run_name.

    Raises:
      UserError: a named file exists and `overwrite` is false, or the folder cannot be written.
    """
    with contextlib.ExitStack() as hold:
        stems = distributed.first(lambda: [str(stem) for stem in _hold(cfg, examples, hold)])
        yield Output(cfg, examples, [parse(stem) for stem in stems])


def _hold(cfg: Config, examples: Sequence[Example], hold: contextlib.ExitStack) -> list[AnyPath]:
    if cfg.prompts is not None:
        suffixes = (FORMATS[cfg.output_format].suffix, naming.RECORD, naming.LATENTS)
        finals = [manifest.video_path(cfg, example) for example in examples]
        stems = [hold.enter_context(naming.reserve_file(final, suffixes, overwrite=True)) for final in finals]
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
