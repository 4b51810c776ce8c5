"""The files of one batch, as a run makes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from maxdiffusion import output
from maxdiffusion.request import Job, Video
from maxdiffusion.runtime.paths import AnyPath

MODEL = "digest of the checkpoint"


@contextlib.contextmanager
def reserved(job: Job, videos: Sequence[Video], latents: np.ndarray) -> Iterator[output.Output]:
    """Reserve the names of a batch and save its latents; whole after the block, if it does not raise."""
    with output.Outputs(job, MODEL) as outputs:
        files = outputs.reserve(tuple(videos))
        files.save_latents(latents)
        yield files
        outputs.finish(files)


def write(files: output.Output, clips: np.ndarray) -> list[AnyPath]:
    """Write whole videos as a run does, in chunks of four frames."""
    with files.writing(clips.shape[1]):
        for first in range(0, clips.shape[1], 4):
            files.add(clips[:, first : first + 4])
        return files.finish(lambda done: None)
