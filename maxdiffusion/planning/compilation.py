"""Compiles the programs of the splits, the best splits first."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.planning import worker
from maxdiffusion.planning.pool import Pool
from maxdiffusion.planning.results import Refused, Stage, Target, Words, modelled
from maxdiffusion.request import on_mesh
from maxdiffusion.request.cost import Layout, Run

log = logging.getLogger(__name__)

Key = tuple[Any, ...]  # a stage and the part of a split on which its programs depend


class Compilation:
    """Replaces modelled figures in rows by compiled ones, until the pool's deadline."""

    def __init__(self, run: Run, layouts: Mapping[Words, Layout], pool: Pool, target: Target) -> None:
        self.job, self.run, self.layouts, self.pool, self.target = run.job, run, layouts, pool, target
        self.rows = modelled(run, layouts, target.gib)
        self.refused: list[Refused] = []
        self.left: set[Key] = set()  # cut off by the deadline
        self.done: set[Key] = set()
        self.failed: dict[Key, UserError] = {}
        self.unkept = "" if run.job.cfg.jax_cache_dir not in ("", "none") else "jax_cache_dir names no folder"

    def compile(self) -> None:
        """Compiles each split with whole weights if these may fit, then with spread ones where they did not.

        Raises:
          UserError: nothing could be compiled.
        """
        pairs: dict[str, list[Words]] = {}
        for row in sorted(self.rows.values(), key=lambda row: row.rank):
            pairs.setdefault(row.split, []).append(row.overrides)
        first = [self._likely(pair) for pair in pairs.values()]
        self._compile(first)
        again = {self.rows[words].split for words in first if words in self.rows and not self.rows[words].fits}
        self._compile([w for w, row in self.rows.items() if row.split in again and self.layouts[w].sharded])
        if self.failed and not self.done:
            raise next(iter(self.failed.values()))

    def notes(self) -> list[str]:
        """Caveats of the figures, as sentences."""
        found, all_of_them = [], f"{len(self.left | self.done | self.failed.keys())} compilations"
        if self.left:
            again = "" if self.unkept else "; run again for the rest: compiled programs are kept"
            found.append(
                f"plan_minutes={self.job.cfg.plan_minutes:g} ended before {len(self.left)} of {all_of_them}{again}"
            )
        if self.unkept and self.done:
            found.append(f"what was compiled is not kept for the next plan: {self.unkept}")
        found += dict.fromkeys(f"{len(self.failed)} of {all_of_them} failed: {error}" for error in self.failed.values())
        if any(row.source == "modelled" for row in self.rows.values()):
            found.append("modelled: not compiled, arithmetic alone")
        return found

    def _likely(self, pair: list[Words]) -> Words:
        """Of splits that differ in the placement of weights, the one with whole weights if these leave room."""
        whole = [words for words in pair if self.run.transformers(self.layouts[words]) < 0.97 * self.target.gib]
        return min(whole or pair, key=lambda words: self.layouts[words].sharded == bool(whole))

    def _key(self, stage: str, words: Words) -> Key:
        """Identifies a stage's programs: text and decode are the same where weights and pictures are placed alike."""
        if stage == "denoise":
            return stage, words
        layout = self.layouts[words]
        spread = (layout.data, layout.fsdp, layout.context, layout.attention.tensor)
        conditions = self.job.spec.task.conditions
        pictures = stage == "decode" or bool(self.job.cfg.video) or conditions not in ((), ("video_to_video",))
        stays = self.run.units(layout) > len(self.job.segments)  # the transformer stays in memory during decoding
        return stage, spread if pictures or layout.sharded else (), layout.sharded and (stage == "text" or stays)

    def _compile(self, wanted: Iterable[Words]) -> None:
        jobs, names = {}, {}
        for words in wanted:
            for stage in ("denoise", "decode", "text"):
                key = self._key(stage, words)
                if key not in self.done and key not in jobs:
                    job = on_mesh(self.job, words)
                    jobs[key] = functools.partial(worker.compile_stage, job, stage, self.target)
                    names[key] = self.rows[words].split
        if jobs:
            log.info("compiling %d programs' stages; the first takes minutes", len(jobs))
        for key, answer in self.pool.map(jobs):
            self._take(key, names[key], answer)

    def _take(self, key: Key, split: str, answer: worker.Answer | UserError | None) -> None:
        if answer is None:
            self.left.add(key)
            return
        if isinstance(answer, UserError):
            self.failed[key] = answer
            log.warning("%s of %s: %s", key[0], split, answer)
            return
        self.unkept = answer.unkept or self.unkept
        mine = [row for words, row in self.rows.items() if self._key(key[0], words) == key]
        if answer.stage is None:
            self.refused += [Refused(row.split, answer.refused) for row in mine]
            for row in mine:
                del self.rows[row.overrides]
            return
        self.done.add(key)
        for row in mine:
            row.stages[key[0]] = _timed(answer.stage, row.stages[key[0]])
        log.info("%s of %s: %.2f GiB, compiled in %.0f s", key[0], split, answer.stage.gib, answer.took)


def _timed(stage: Stage, rough: Stage) -> Stage:
    """The compiled stage, with the modelled seconds if its compiler counts no cycles."""
    if stage.seconds.total or not stage.programs:
        return stage
    (model,) = rough.programs
    calls = sum(each.times for each in stage.programs if each.name == model.name)
    seconds = rough.seconds * (1 / max(1, calls))
    programs = (each._replace(seconds=seconds) if each.name == model.name else each for each in stage.programs)
    return dataclasses.replace(stage, programs=tuple(programs))
