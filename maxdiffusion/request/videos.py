"""The videos that a config asks for: the lines of its prompt file, or its lists paired one to one."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from maxdiffusion.config.schema import Config
from maxdiffusion.errors import UserError
from maxdiffusion.media.fetch import open_image
from maxdiffusion.media.sizes import Proportions
from maxdiffusion.request import clips, prompt_file

# Of the files beside a video. Not .jpg: an image that the video was made from often has its name.
ENDINGS = (".json", ".latents.safetensors", ".sheet.jpg")
LISTS = ("prompt", "negative_prompt", "seed", "image", "last_image")


@dataclasses.dataclass(frozen=True)
class Video:
    """One video to make: what it shows, its size in pixels, its name in a prompt file, its first and last image.

    A seed of -1 is to be drawn; `drawn` says that it was.
    """

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    output: str | None = None
    image: str | None = None
    last_image: str | None = None
    drawn: bool = False

    @property
    def images(self) -> tuple[str, ...]:
        """The images that are given, first and last."""
        return tuple(image for image in (self.image, self.last_image) if image is not None)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and number of images: equal for videos that one program makes."""
        return self.height, self.width, len(self.images)


def halved(video: Video) -> Video:
    """The video at half height and width."""
    return dataclasses.replace(video, height=video.height // 2, width=video.width // 2)


def read(cfg: Config, proportions: Proportions | None = None) -> tuple[Video, ...]:
    """One Video for each entry: lists have equal lengths, and a list of one serves all; no prompt is an empty one.

    A line of a prompt file has the size of its image by `proportions`, unless it or the config gives an exact one.

    Raises:
      UserError: two lists have different lengths, neither of them 1, or the prompt file or an image of it cannot be
        used.
    """
    lists: dict[str, tuple[Any, ...]] = {
        "prompt": cfg.prompt or cfg.clip_prompts[:1] or ("",),
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
    rows = tuple(Video(**row, width=cfg.width, height=cfg.height) for row in named)
    if cfg.prompts is None:
        return rows
    if count > 1:
        raise UserError(
            f"prompts={cfg.prompts} has a line for each video; give one prompt, negative_prompt, seed and image "
            "beside it, for the lines that have none of their own."
        )
    return tuple(_named(cfg, rows[0], proportions))


def single(cfg: Config, video: Video) -> Config:
    """The config that makes this video alone, without the prompt file, under a name that follows from the prompt."""
    line = dataclasses.asdict(video) | {"prompts": None}
    del line["output"], line["drawn"]
    lists = {key: () if line[key] is None else (line[key],) for key in LISTS}
    return cfg.model_copy(update={**line, **lists})


def _named(cfg: Config, base: Video, proportions: Proportions | None) -> Iterator[Video]:
    """The videos of the prompt file, each with a name of its own."""
    path = str(cfg.prompts)
    others: dict[str, str] = {}
    pixels = functools.cache(lambda image: open_image(image).size)
    for where, fields in prompt_file.read(path):
        fields = {key: value for key, value in fields.items() if key not in prompt_file.OF_THE_RUN}
        size = fields.pop("size", None)
        sides = dict(zip(("width", "height"), size, strict=True)) if size else {}
        video = dataclasses.replace(base, **{**sides, **fields})
        area = math.prod(size) if size else proportions and proportions.area
        if proportions and area and video.image and not fields.keys() & {"width", "height"}:
            width, height = proportions.size(area, pixels(video.image))
            video = dataclasses.replace(video, width=width, height=height)
        if not video.prompt.strip():
            raise UserError(f'{where} has no prompt and the config gives none; write {{"prompt": "a red circle"}}.')
        name = _checked(video.output, cfg.output_format, where) if video.output else stem_of(cfg, video)
        if name.casefold() == prompt_file.manifest_stem(path).casefold():
            raise UserError(f"{where} gives output={name!r}, the name of the manifest; choose another.")
        # A folder of frames has no suffix, so that its name may be that of another line's record.
        files = [name, *(f"{name}{ending}" for ending in ENDINGS)] if cfg.output_format == "png" else [name]
        other = next((others[file.casefold()] for file in files if file.casefold() in others), where)
        others |= dict.fromkeys(map(str.casefold, files), where)
        if other != where:
            raise UserError(
                f"{where} and {other.rpartition(', ')[2]} would both be written as {name!r}; give one of them another "
                '"output".'
            )
        yield dataclasses.replace(video, output=name)


def _checked(given: str, ending: str, where: str) -> str:
    name = given[: -len(ending) - 1] if given.lower().endswith(f".{ending}") else given
    if not name or name.startswith(".") or re.search(r"[/\\\x00-\x1f\ud800-\udfff]", name) or len(name.encode()) > 120:
        raise UserError(
            f"{where} gives output={given!r}, which names no file below output_dir/run_name; write a name without "
            "slashes, of at most 120 bytes."
        )
    return name


# With seed, size, counter and the longest suffix a name stays below 143 bytes, the shortest limit in use (eCryptfs).
_SLUG_BYTES = 60


def stem_of(cfg: Config, video: Video) -> str:
    """The default file name of a video, without suffix; without the prompt where metadata omit it."""
    words = video.prompt if cfg.save_prompt_in_metadata else ""
    return default_stem(words, video.seed, video.width, video.height, clips.total_frames(cfg))


def default_stem(prompt: str, seed: int, width: int, height: int, num_frames: int) -> str:
    """`a-red-circle-moving-left-seed7-96x96x17`: the prompt's words, the seed, width x height x frames.

    Letters and digits of every script are kept, in lower case, and all else becomes one hyphen, so that the name is
    legal on every file system; a prompt without any letter gives `video`. A long prompt is cut after a word. A line of
    a prompt file whose seed is -1 gives `seed-random`, the same when its command runs again.
    """
    return f"{_slug(prompt)}-seed{'-random' if seed < 0 else seed}-{width}x{height}x{num_frames}"


def _slug(prompt: str) -> str:
    # NFKC, so that one look is one name; a lone combining mark (category M) belongs to the letter before it.
    text = unicodedata.normalize("NFKC", prompt).lower()
    kept = "".join(c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in text)
    slug = "-".join(kept.split())
    if len(slug.encode()) > _SLUG_BYTES:
        cut = slug.encode()[: _SLUG_BYTES + 1].decode(errors="ignore")
        words = cut.rpartition("-")[0]
        slug = words or slug.encode()[:_SLUG_BYTES].decode(errors="ignore")
    return slug or "video"
