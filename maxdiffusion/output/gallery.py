"""The gallery: a page `index.html` beside the videos, made of their records, which plays them without a network.

`gallery.html` is its frame, with styles and script. It names files that lie beside it and asks for nothing else.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import logging
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from maxdiffusion.config import schema
from maxdiffusion.errors import UserError
from maxdiffusion.output import manifest, names
from maxdiffusion.request import Job
from maxdiffusion.runtime import distributed, paths
from maxdiffusion.runtime.atomic import atomic_path, explained
from maxdiffusion.runtime.paths import AnyPath, parse

log = logging.getLogger(__name__)

PAGE = "index.html"
_MARK = b'<meta name="generator" content="maxdiffusion">'
_FORMATS = {".mp4": "mp4", ".gif": "gif", ".webp": "webp"}  # shown without a record, too
# Shown of every video, or of none; other settings where they differ.
_SAID = {"prompts", "prompt", "seed", "width", "height", "num_frames", "fps"}


class Gallery:
    """The page of a run's folder; nothing with gallery=false. Of several processes, process 0 reads and writes."""

    def __init__(self, job: Job) -> None:
        self._job, cfg = job, job.cfg
        self._folder = parse(cfg.save_file).parent if cfg.save_file else manifest.folder(job)
        self._records: dict[str, Any] = {}  # file name -> content

    def write(self) -> None:
        """Write the page of the videos that are in the folder, if there are any.

        Raises:
          UserError: the folder's index.html is another page, or the folder cannot be read or written.
        """
        distributed.on_process_0(self._write)

    def add(self, videos: Sequence[AnyPath]) -> None:
        """Write the page again with these new videos. A page that cannot be written is one line in the log."""

        def write_again() -> None:
            stale = [path.name for path in videos]
            self._records = {
                name: record
                for name, record in self._records.items()
                if not isinstance(record, dict) or record.get("output") not in stale
            }
            try:
                self._write()
            except UserError as error:
                log.warning("%s; the videos are whole, and the next one brings the page up to date", error)

        distributed.on_process_0(write_again)

    def _write(self) -> None:
        if not self._job.cfg.gallery:
            return
        folder, path, shown = self._folder, self._folder / PAGE, None
        title = (folder.absolute() if isinstance(folder, Path) else folder).name
        with explained(path), paths.as_oserror(path):
            exists = path.exists()
            if exists and _MARK not in paths.read(path, 0, 512):
                raise UserError(f"{path} is not a page of this program and is kept; move it, or write gallery=false.")
            while (here := self._listed()) != shown:  # again, where another run has added a video meanwhile
                found = list(entries(here, self._records))
                if not found and not exists:
                    return
                with atomic_path(path, overwrite=True) as temporary:
                    temporary.write_bytes(page(title, found).encode("utf-8", "backslashreplace"))
                shown = here

    def _listed(self) -> set[str]:
        """The names of the folder's files; reads the records that are new."""
        here = {name for name in paths.names(self._folder) if not name.startswith(".") and name != PAGE}
        self._records = {name: content for name, content in self._records.items() if name in here}
        new = [name for name in here - self._records.keys() if name.endswith(names.RECORD)]
        self._records.update(zip(new, paths.each(self._folder, self._content, new), strict=True))
        return here

    def _content(self, name: str) -> Any:
        try:
            return json.loads((self._folder / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # removed by now; not JSON
            return None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A video of the page.

    Attributes:
      name: its file or folder.
      format: a key of `media.write.FORMATS`.
      record: the name of its record, from which all below is; empty where it has none.
      sheet: the name of its contact sheet; empty where there is none.
      config: every key of its run, as JSON.
      seconds: from the beginning of its run until it was whole.
    """

    name: str
    format: str
    record: str = ""
    sheet: str = ""
    prompt: str = ""
    seed: int | None = None
    width: int = 0
    height: int = 0
    frames: int = 0
    fps: Fraction = Fraction(1)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = math.nan


def entries(here: Collection[str], records: Mapping[str, Any]) -> Iterator[Entry]:
    """The videos among the files `here` by name, 2 before 10; `records` are the contents of the JSON files.

    A video that was renamed has no record; a record whose video was removed is left out.
    """
    known = [entry for name, content in records.items() if (entry := _entry(name, content, here))]
    found = {entry.name: entry for entry in known if entry.name in here}
    for name in set(here) - found.keys():
        if fmt := _FORMATS.get(os.path.splitext(name)[1].lower()):
            found[name] = Entry(name, fmt)
    yield from (found[name] for name in sorted(found, key=_natural))


def _entry(name: str, record: Any, here: Collection[str]) -> Entry | None:
    """The video of a record; None of other JSON."""
    try:
        config, sheet = record["config"], str(record.get("contact_sheet"))
        width, height = int(config["width"]), int(config["height"])
        return Entry(
            str(record["output"]),
            str(config["output_format"]),
            name,
            sheet if sheet in here else "",
            _shown(config["prompt"]),
            int(record["seed"]),
            width,
            height,
            int(record.get("frames", config["num_frames"])),
            Fraction(str(config["fps"])),
            config,
            float(record["timings"].get("total_seconds", "nan")),
        )
    except (AttributeError, LookupError, TypeError, ValueError, ZeroDivisionError):
        return None


def _natural(name: str) -> list[Any]:
    parts = re.split(r"(\d+)", os.path.splitext(name)[0])  # without the suffix, so that `a.mp4` is before `a-2.mp4`
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def page(title: str, videos: Sequence[Entry]) -> str:
    """The page of these videos, as HTML; all that they hold is text in it."""
    differing = _differing([video.config for video in videos if video.record])
    parts = {
        "title": escape(title),
        "count": f"{len(videos)} video{'s' * (len(videos) != 1)}",
        "cards": "\n".join(_card(video, differing) for video in videos),
    }
    frame = importlib.resources.files("maxdiffusion.output").joinpath("gallery.html").read_text(encoding="utf-8")
    return re.sub(r"<!--(\w+)-->", lambda match: parts[match[1]], frame)


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that decide the pixels and have not one value in all configs."""
    keys = [key for key, about in schema.KEYS.items() if about.of_the_video or about.group == "prompt"]
    return [key for key in keys if key not in _SAID and len({json.dumps(config.get(key)) for config in configs}) > 1]


def _card(video: Entry, differing: Iterable[str]) -> str:
    stage = f' style="--w: {video.width}; --h: {video.height}"' if video.record else ""
    record = f'<a href="{_url(video.record)}">record</a>' if video.record else "<span></span>"
    facts = "".join(
        f'<div><dt>{escape(name)}</dt><dd dir="auto">{escape(value)}</dd></div>'
        for name, value in _facts(video, differing)
    )
    return f"""
<article class="card" data-frames="{video.frames}" data-fps="{float(video.fps)}">
<div class="stage" tabindex="0"{stage}>{_media(video)}</div>
<div class="about">
<p class="prompt" dir="auto">{escape(video.prompt)}</p>
<dl>{facts}</dl>
<a href="{_url(video.name)}"><bdi>{escape(video.name)}</bdi></a>
</div>
<p class="more">{record}<label><input type="checkbox"> compare</label></p>
</article>"""


def _facts(video: Entry, differing: Iterable[str]) -> Iterator[tuple[str, str]]:
    if not video.record:
        return
    yield "seed", str(video.seed)
    yield "size", f"{video.width} x {video.height}"
    if video.frames > 1:
        yield "length", f"{float(video.frames / video.fps):.3g} s, {video.frames} frames"
    if not math.isnan(video.seconds):
        yield "made after", f"{video.seconds:.1f} s of its run"
    for key in differing:
        if key in video.config:
            yield key, _shown(video.config[key]) or "none"


def _media(video: Entry) -> str:
    """The element that plays a video, and shows the first frame of its contact sheet before, if it has one."""
    url, still = _url(video.name), _url(video.sheet)
    if video.format == "mp4":
        first = f'poster="{still}" preload="none"' if still else 'preload="metadata"'
        return f'<video src="{url}" {first} muted playsinline></video>'
    if video.format == "npy":
        return f'<img src="{still}" class="row" loading="lazy" alt="">' if still else "an array, which no page plays"
    if video.format == "png" and video.frames > 1:
        return f'<img src="{still or url + "/0000.png"}" data-folder="{url}/" loading="lazy" alt="">'
    return f'<img src="{still or url}" data-plays="{url}" loading="lazy" alt="">'


def _shown(value: Any) -> str:
    """A value as one would write it; a list of one as its element."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        return value
    return "" if value in (None, [], {}) else json.dumps(value, ensure_ascii=False)


def _url(name: str) -> str:
    """The relative URL of a file beside the page."""
    return f"./{quote(os.fsencode(name))}" if name else ""
