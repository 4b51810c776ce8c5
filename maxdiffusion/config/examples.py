"""The videos that a config asks for: prompts, negative prompts, seeds and images paired one to one."""

from __future__ import annotations

import dataclasses
from typing import Any

from maxdiffusion.config.schema import Config
from maxdiffusion.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """One video of the batch."""

    prompt: str
    negative_prompt: str
    seed: int
    image: str | None = None
    last_image: str | None = None


def examples(cfg: Config) -> tuple[Example, ...]:
    """One Example per video: lists have equal lengths, and a list of one serves all; no prompt is an empty one.

    Raises:
      UserError: two lists have different lengths, neither of them 1.
    """
    lists: dict[str, tuple[Any, ...]] = {
        "prompt": cfg.prompt or ("",),
        "negative_prompt": cfg.negative_prompt,
        "seed": cfg.seed,
        "image": cfg.image or (None,),
        "last_image": cfg.last_image or (None,),
    }
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
