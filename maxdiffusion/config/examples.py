"""The videos that a config asks for: the lines of its prompt file, or its lists paired one to one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from maxdiffusion.config import prompt_file
from maxdiffusion.config.schema import Config
from maxdiffusion.errors import UserError
from maxdiffusion.media.naming import default_stem


@dataclasses.dataclass(frozen=True)
class Example:
    """One video: what it shows, its pixels, a prompt file's name for its files, and the images at its ends."""

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    output: str | None = None
    image: str | None = None
    last_image: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and the number of images: what is alike in videos that one program makes."""
        return self.height, self.width, sum(image is not None for image in (self.image, self.last_image))


def examples(cfg: Config) -> tuple[Example, ...]:
    """One Example per video: lists have equal lengths, and a list of one serves all; no prompt is an empty one.

    Raises:
      UserError: two lists have different lengths, neither of them 1, or the prompt file cannot be used.
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
    columns: Any = (values * count if len(values) == 1 else values for values in lists.values())
    named = (dict(zip(lists, row, strict=True)) for row in zip(*columns, strict=True))
    rows = tuple(Example(**row, width=cfg.width, height=cfg.height) for row in named)
    if cfg.prompts is None:
        return rows
    if count > 1:
        raise UserError(
            f"prompts={cfg.prompts} has a line for each video; give one prompt, negative_prompt, seed and image "
            "beside it, for the lines that have none of their own."
        )

    def stem(line: Mapping[str, Any]) -> str:
        words = line["prompt"] if cfg.save_prompt_in_metadata else ""
        return default_stem(words, line["seed"], line["width"], line["height"], cfg.num_frames)

    lines = prompt_file.read(cfg.prompts, dataclasses.asdict(rows[0]), cfg.output_format, stem)
    return tuple(Example(**line) for line in lines)


def alone(cfg: Config, video: Example) -> Config:
    """The config that makes one line's video without the prompt file, under a name that follows from the prompt."""
    line = dataclasses.asdict(video) | {"prompts": None}
    del line["output"]
    lists = ("prompt", "negative_prompt", "seed", "image", "last_image")
    return cfg.model_copy(update={**line, **{key: () if line[key] is None else (line[key],) for key in lists}})
