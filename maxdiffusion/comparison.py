"""`compare=[...]`: one video exactly and by each variant, from the same noise, and what the variants lose."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from maxdiffusion import generate_wan
from maxdiffusion.media.contact_sheet import contact_sheet
from maxdiffusion.media.similarity import psnr, ssim
from maxdiffusion.media.write import write
from maxdiffusion.output import states
from maxdiffusion.request import Job, seeds, session, with_words
from maxdiffusion.request.videos import stem_of
from maxdiffusion.runtime import distributed
from maxdiffusion.runtime.paths import AnyPath

GAIN = 4  # by which the picture enlarges differences
COLUMNS = 6  # frames of the picture


class Row(NamedTuple):
    """A variant beside the exact video: calls and seconds of the denoise loop, PSNR in dB and SSIM of the frames."""

    name: str
    calls: int
    seconds: float
    psnr: float
    ssim: float


def run(job: Job) -> list[Row]:
    """Makes the videos, prints the table and returns its rows, the exact one first.

    Below the folder of results, `<name>.compare/` holds each video as `.npy` and `.mp4`, its record and latents, all
    videos side by side in `compare.mp4` and the picture `compare.jpg`: frames of the exact video, and below them those
    of each variant and the differences.

    Raises:
      UserError: a variant cannot be made; earlier videos stay.
    """
    session.start(job)
    job = seeds.drawn(job)
    folder = states.folder(job) / f"{stem_of(job.cfg, job.videos[0])}.compare"
    rows, videos = [], []
    for name, each in _variants(job, folder):
        (path,) = generate_wan.make(each)
        if distributed.index():
            continue
        with path.open("rb") as stored:
            frames = np.load(stored)
        record = json.loads(path.with_suffix(".json").read_text())
        write(frames, path.with_suffix(".mp4"), job.cfg.fps, "mp4", {"variant": name}, overwrite=True)
        videos.append(frames)
        seconds = record["timings"]["seconds"].get("denoise", 0.0)
        rows.append(Row(name, _calls(each, record), seconds, psnr(videos[0], frames), ssim(videos[0], frames)))
    if rows:
        write(np.concatenate(videos, axis=2), folder / "compare.mp4", job.cfg.fps, "mp4", {}, overwrite=True)
        write(picture(videos)[None], folder / "compare.jpg", job.cfg.fps, "jpg", {}, overwrite=True)
        print(table(rows))
        print(f"videos and picture are in {folder}")
    return rows


def table(rows: list[Row]) -> str:
    """The rows as text."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'variant':<{width}} {'calls':>6} {'seconds':>9} {'PSNR dB':>8} {'SSIM':>7}"]
    lines += [f"{r.name:<{width}} {r.calls:>6} {r.seconds:>9.2f} {r.psnr:>8.2f} {r.ssim:>7.4f}" for r in rows]
    return "\n".join(lines)


def picture(videos: list[UInt8[np.ndarray, "f h w c"]]) -> UInt8[np.ndarray, "h2 w2 c"]:
    """Frames of the first video, and below them at the same times those of each other and its difference."""
    exact, *others = videos
    strips = [contact_sheet(exact, COLUMNS)]
    for each in others:
        strips.append(contact_sheet(each, COLUMNS))
        difference = np.abs(strips[-1].astype(np.int16) - strips[0]) * GAIN
        strips.append(np.minimum(difference, 255).astype(np.uint8))
    return np.concatenate(strips)


def _variants(job: Job, folder: AnyPath) -> Iterator[tuple[str, Job]]:
    for words in ("", *job.cfg.compare):
        each, name = with_words(job, words), words or "exact"
        update: dict[str, Any] = {"save_file": str(folder / f"{re.sub(r'[^A-Za-z0-9._]+', '-', name)}.npy")}
        update |= {"output_format": "npy", "overwrite": True, "contact_sheet": 0, "gallery": False, "compare": ()}
        yield name, dataclasses.replace(each, cfg=each.cfg.model_copy(update=update))


def _calls(job: Job, record: Mapping[str, Any]) -> int:
    """Calls of the network, a batch of both branches of guidance counted as two."""
    if "cache" in record:
        return sum(len(steps) for segment in record["cache"]["computed"] for steps in segment.values())
    each = session.recipe_of(job).experts
    return len(job.segments) * sum((expert.stop - expert.start) * (1 + expert.guided) for expert in each)
