"""The threshold that `cache_psnr` has found, kept beside the results until the command has ended.

A run that was stopped goes on with it: `.<command>.threshold`, a JSON file.
"""

from __future__ import annotations

import json

from maxdiffusion.output import draws, states
from maxdiffusion.request import Job
from maxdiffusion.runtime import distributed, paths
from maxdiffusion.runtime.atomic import write_json

SUFFIX = ".threshold"


class Threshold:
    """The file of one command's threshold. Of several processes, process 0 reads and writes it."""

    def __init__(self, job: Job) -> None:
        self._path = states.folder(job) / f".{draws.command(job)}{SUFFIX}"

    def read(self) -> float | None:
        """The threshold of a run of this command that did not end."""

        def found() -> float | None:
            there = self._path.name in paths.names(self._path.parent)
            return float(json.loads(self._path.read_text())["threshold"]) if there else None

        return distributed.on_process_0(found)

    def keep(self, threshold: float) -> None:
        """Write it, in place of another one."""
        distributed.on_process_0(lambda: write_json(self._path, {"threshold": threshold}, overwrite=True))

    def remove(self) -> None:
        """Remove the file, if it is there."""
        if distributed.index() == 0 and self._path.name in paths.names(self._path.parent):
            self._path.unlink()
