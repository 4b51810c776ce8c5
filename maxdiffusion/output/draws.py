"""The draw of a run with seed=-1, kept beside its results until it ends, so that the same command goes on with it.

The number from which the seeds follow is in the name of a lock file, `.<command>.<number>.draw`. A run that is stopped
or fails leaves it, free, for the next run of the command; one that ends removes it, and the next draws anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator

from maxdiffusion.output import manifest, names, states
from maxdiffusion.request import Job, seeds
from maxdiffusion.runtime import distributed, lock, paths
from maxdiffusion.runtime.atomic import explained

log = logging.getLogger(__name__)

SUFFIX = ".draw"


@contextlib.contextmanager
def drawn(job: Job) -> Iterator[Job]:
    """The run with a seed for every video whose seed is -1: those of a stopped run of this command, or new ones.

    Raises:
      UserError: the folder of the results cannot be written.
    """
    asked = any(video.seed < 0 for video in job.videos)
    if job.cfg.decode_latents or not (asked or job.cfg.prompts):
        yield job
        return
    with contextlib.ExitStack() as stack:
        number = distributed.on_process_0(lambda: stack.enter_context(_number(job, asked)))
        yield seeds.drawn(job, number) if asked else job


@contextlib.contextmanager
def _number(job: Job, asked: bool) -> Iterator[str]:
    """The number of the draw, its lock held; one that is left and not `asked` for is removed."""
    folder, run = states.folder(job), command(job)
    begin = f".{run}."
    left = [name for name in paths.names(folder) if name.startswith(begin) and name.endswith(SUFFIX)]
    new = [f"{begin}{seeds.number()}{SUFFIX}"] if asked else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(names.removed_if_empty(folder))
        with explained(folder):
            locks = (
                (name, stack.enter_context(lock.lock_of_living(folder / name, run))) for name in (*sorted(left), *new)
            )
            name = next((name for name, mine in locks if mine), "")
        if not name:
            yield name
            return
        if name in left and asked:
            log.info("seed=-1: goes on with the seeds that a run of this command drew before it was stopped")
        try:
            yield name.removeprefix(begin).removesuffix(SUFFIX)
        except BaseException:
            if set(paths.names(folder)) - {name}:  # a state, latents or videos of these seeds
                lock.leave(folder / name)
            raise


def command(job: Job) -> str:
    """16 hexadecimal digits that name a command by the videos that it asks for; of a prompt file by its path."""
    values = manifest.settings(job.cfg) | {key: getattr(job.cfg, key) for key in ("prompts", "save_file")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
