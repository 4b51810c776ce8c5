"""The videos that a config asks for: prompts, negative prompts and seeds paired one to one, and their batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from maxdiffusion.config.schema import Config
from maxdiffusion.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """One video of the batch."""

    prompt: str
    negative_prompt: str
    seed: int


def examples(cfg: Config) -> tuple[Example, ...]:
    """One Example per video: lists have equal lengths, and a list of one serves all; no prompt is an empty one.

    Raises:
      UserError: two lists have different lengths, neither of them 1.
    """
    lists = {"prompt": cfg.prompt or ("",), "negative_prompt": cfg.negative_prompt, "seed": cfg.seed}
    count = max(len(values) for values in lists.values())
    for name, values in lists.items():
        if len(values) not in (1, count):
            longest = next(key for key, others in lists.items() if len(others) == count)
            raise UserError(
                f"{name} has {len(values)} entries and {longest} has {count}, which cannot be paired; "
                f"give {name} {count} entries, or one for all."
            )
    columns = (values * count if len(values) == 1 else values for values in lists.values())
    return tuple(Example(*row) for row in zip(*columns, strict=True))


def batches(videos: Sequence[Example], size: int) -> Iterator[tuple[Example, ...]]:
    """The videos in groups of `size`, in order; the last group may be smaller."""
    for start in range(0, len(videos), size):
        yield tuple(videos[start : start + size])
