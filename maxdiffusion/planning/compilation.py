"""Which programs of which splits are compiled, in which order, and what follows for the others."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

from maxdiffusion import variants
from maxdiffusion.config import Config
from maxdiffusion.config.load import replaced
from maxdiffusion.planning import analytic
from maxdiffusion.planning.pool import Answer, Job, Pool
from maxdiffusion.planning.results import Refused, Row, Split, Stage

log = logging.getLogger(__name__)

Key = tuple[Any, ...]  # a stage and what of a split its programs follow from


def rank(row: Row) -> tuple[bool, bool, float]:
    """What fits first, then what was compiled as a whole, then the fastest."""
    return not row.fits, not row.known, row.seconds.total


class Compilation:
    """Takes the place of modelled figures in `rows`, as far as time goes."""

    def __init__(
        self,
        cfg: Config,
        rows: dict[Split, Row],
        model: analytic.Model,
        pool: Pool,
        gib: float,
        job: Callable[..., Job],
    ) -> None:
        """`rows` is changed in place; `job` makes a job of a config and a stage."""
        self.cfg, self.rows, self.model, self.pool, self.gib, self.job = cfg, rows, model, pool, gib, job
        self.modelled = {split: dict(row.stages) for split, row in rows.items()}
        self.refused: list[Refused] = []
        self.left: set[Key] = set()
        self.done: set[Key] = set()

    def run(self) -> None:
        """Each split with the weights that are likely to fit, then the recommended one where it was derived."""
        self._compile(self._first())
        self._derive()
        while self.rows:
            best = min(self.rows.values(), key=rank)
            wanted = [
                (self._key(name, best.split), best.split)
                for name, stage in best.stages.items()
                if stage.source != "compiled"
            ]
            if not best.fits or not (wanted := [each for each in wanted if each[0] not in self.left]):
                return
            self._compile(wanted)
            self._derive()

    def notes(self) -> list[str]:
        """What one has to know of the figures."""
        found = []
        if self.left:
            found.append(
                f"plan_minutes={self.cfg.plan_minutes:g} ended before {len(self.left)} of {len(self.left | self.done)} "
                "compilations; run again to have them, too: what is compiled is kept"
            )
        sources = {stage.source for row in self.rows.values() for stage in row.stages.values()}
        if "derived" in sources:
            found.append("derived: from the same split compiled with its weights otherwise spread")
        if "modelled" in sources:
            found.append("modelled: not compiled, arithmetic alone")
        return found

    def _first(self) -> list[tuple[Key, Split]]:
        """Stage by stage of each split, the most promising first; of two that differ in weights one."""
        twins: dict[str, list[Split]] = {}
        for split in self.rows:
            twins.setdefault(split.name, []).append(split)
        chosen = []
        for pair in twins.values():
            whole = [split for split in pair if self.model.transformers(split) < 0.97 * self.gib]
            chosen.append(min(whole or pair, key=lambda split: split.sharded if whole else not split.sharded))
        chosen.sort(key=lambda split: rank(self.rows[split]))
        return [(self._key(stage, split), split) for split in chosen for stage in ("denoise", "decode", "text")]

    def _key(self, stage: str, split: Split) -> Key:
        """Text and decode are the same on splits that place their weights and pictures alike."""
        spread = (split.data, split.fsdp, split.context, split.tensor)
        spec = variants.get(self.cfg.model_name)
        pictures = stage == "decode" or bool(self.cfg.video) or spec.conditions not in ((), ("start",))
        if stage == "denoise":
            return stage, split.overrides
        several = self.model.units(split.data) > self.model.segments  # the transformer stays while others are decoded
        return stage, spread if pictures or split.sharded else (), split.sharded and (stage == "text" or several)

    def _compile(self, wanted: list[tuple[Key, Split]]) -> None:
        jobs: dict[Key, Job] = {}
        for key, split in wanted:
            if key not in self.done:
                jobs.setdefault(key, self.job(config=replaced(self.cfg, split.overrides).to_json(), stage=key[0]))
        if jobs:
            log.info("compiling %d programs' stages; the first takes minutes", len(jobs))
        names = {key: split.name for key, split in reversed(wanted)}
        self.pool.map(jobs, lambda key, answer: self._answer(key, names[key], answer))

    def _answer(self, key: Key, name: str, answer: Answer | None) -> None:
        if answer is None:
            self.left.add(key)
        elif answer.stage is None:
            for split in [split for split in self.rows if self._key(key[0], split) == key]:
                del self.rows[split]
                self.refused.append(Refused(split.name, answer.refused or ""))
        else:
            self._take(key, answer.stage)
            took = sum(program.compile_seconds for program in answer.stage.programs)
            log.info("%s of %s: %.2f GiB, compiled in %.0f s", key[0], name, answer.stage.gib, took)

    def _take(self, key: Key, stage: Stage) -> None:
        self.done.add(key)
        for split, row in self.rows.items():
            if self._key(key[0], split) == key:
                timed = stage.seconds.total or not stage.programs
                row.stages[key[0]] = stage if timed else analytic.timed(stage, self.modelled[split][key[0]])

    def _derive(self) -> None:
        """What differs in its weights alone from what was compiled."""
        for (split, row), (other, twin) in itertools.product(self.rows.items(), repeat=2):
            for name in ("text", "denoise"):
                ours, theirs = row.stages[name], twin.stages[name]
                if (ours.source, theirs.source) == ("modelled", "compiled") and split.name == other.name:
                    row.stages[name] = analytic.twin(name, theirs, self.model, other, split, self.gib)
