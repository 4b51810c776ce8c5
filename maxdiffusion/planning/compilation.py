"""Which programs of which splits are compiled, and in which order."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.planning import worker
from maxdiffusion.planning.pool import Pool
from maxdiffusion.planning.results import Answer, Refused, Row, Split, Stage
from maxdiffusion.planning.target import Target
from maxdiffusion.request import Job, on_mesh
from maxdiffusion.request.cost import Layout, Run

log = logging.getLogger(__name__)

Key = tuple[Any, ...]  # a stage and what of a split its programs follow from


def rank(row: Row) -> tuple[bool, bool, float]:
    """What fits first, then what was compiled as a whole, then the fastest."""
    return not row.fits, not row.compiled, row.seconds.total


class Compilation:
    """Replaces modelled figures in rows by compiled ones, as far as time goes."""

    def __init__(
        self,
        job: Job,
        rows: dict[Split, Row],
        layouts: Mapping[Split, Layout],
        run: Run,
        pool: Pool,
        target: Target,
    ) -> None:
        """`rows` is changed in place."""
        self.job, self.rows, self.layouts, self.run, self.pool, self.target = job, rows, layouts, run, pool, target
        self.refused: list[Refused] = []
        self.left: set[Key] = set()  # for which time did not suffice
        self.done: set[Key] = set()
        self.failed: dict[Key, UserError] = {}
        self.unkept = "" if job.cfg.jax_cache_dir not in ("", "none") else "jax_cache_dir names no folder"

    def compile(self) -> None:
        """Compiles each split with whole weights if these may fit, then with spread ones where they did not.

        Raises:
          UserError: nothing could be compiled.
        """
        pairs: dict[str, list[Split]] = {}
        for split in sorted(self.rows, key=lambda split: rank(self.rows[split])):
            pairs.setdefault(split.name, []).append(split)
        first = [self._likely(pair) for pair in pairs.values()]
        self._compile(first)
        again = {split.name for split in first if split in self.rows and not self.rows[split].fits}
        self._compile(split for split in list(self.rows) if split.name in again and split.sharded)
        if self.failed and not self.done:
            raise next(iter(self.failed.values()))

    def notes(self) -> list[str]:
        """What one has to know of the figures, as sentences."""
        found, all_of_them = [], f"{len(self.left | self.done | self.failed.keys())} compilations"
        if self.left:
            again = "" if self.unkept else "; run again to have them, too: what is compiled is kept"
            found.append(
                f"plan_minutes={self.job.cfg.plan_minutes:g} ended before {len(self.left)} of {all_of_them}{again}"
            )
        if self.unkept and self.done:
            found.append(f"what was compiled is not kept for the next plan: {self.unkept}")
        found += dict.fromkeys(f"{len(self.failed)} of {all_of_them} failed: {error}" for error in self.failed.values())
        if any(stage.source == "modelled" for row in self.rows.values() for stage in row.stages.values()):
            found.append("modelled: not compiled, arithmetic alone")
        return found

    def _likely(self, pair: list[Split]) -> Split:
        """Of splits that differ in how the weights lie, whole ones where they leave room."""
        whole = [split for split in pair if self.run.transformers(self.layouts[split]) < 0.97 * self.target.gib]
        return min(whole or pair, key=lambda split: split.sharded if whole else not split.sharded)

    def _key(self, stage: str, split: Split) -> Key:
        """Text and decode are the same on splits that place their weights and pictures alike."""
        if stage == "denoise":
            return stage, split.overrides
        spread = (split.data, split.fsdp, split.context, split.tensor)
        conditions = self.job.spec.task.conditions
        pictures = stage == "decode" or bool(self.job.cfg.video) or conditions not in ((), ("video_to_video",))
        stays = self.run.units(self.layouts[split]) > self.run.segments  # the transformer, while others are decoded
        return stage, spread if pictures or split.sharded else (), split.sharded and (stage == "text" or stays)

    def _compile(self, wanted: Iterable[Split]) -> None:
        jobs, names = {}, {}
        for split in wanted:
            for stage in ("denoise", "decode", "text"):
                key = self._key(stage, split)
                if key not in self.done and key not in jobs:
                    job, slice_ = on_mesh(self.job, split.overrides), self.target.slice
                    topology = slice_.topology if slice_ else None
                    jobs[key] = functools.partial(worker.compile_stage, job, stage, topology, self.target.gib)
                    names[key] = split.name
        if jobs:
            log.info("compiling %d programs' stages; the first takes minutes", len(jobs))
        self.pool.map(jobs, lambda key, answer: self._take(key, names[key], answer))

    def _take(self, key: Key, name: str, answer: Answer | UserError | None) -> None:
        mine = [split for split in self.rows if self._key(key[0], split) == key]
        match answer:
            case None:
                self.left.add(key)
            case UserError():
                self.failed[key] = answer
                log.warning("%s of %s: %s", key[0], name, answer)
            case Answer(stage=None):
                for split in mine:
                    del self.rows[split]
                    self.refused.append(Refused(split.name, answer.refused))
            case Answer(stage=Stage() as stage):
                self.done.add(key)
                for split in mine:
                    stages = self.rows[split].stages
                    timed = stage.seconds.total or not stage.programs
                    stages[key[0]] = stage if timed else stage.timed(stages[key[0]])
                took = sum(program.compile_seconds for program in stage.programs)
                log.info("%s of %s: %.2f GiB, compiled in %.0f s", key[0], name, stage.gib, took)
        if isinstance(answer, Answer):
            self.unkept = answer.unkept or self.unkept
