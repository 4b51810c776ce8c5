"""Videos with records and a page, without a model: each is grey levels that rise frame by frame."""

from __future__ import annotations

import html.parser
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maxdiffusion import request
from tests.support.output import reserved, write

PAGE = str(Path(__file__).parents[2] / "configs" / "wan_tiny.yml")
LATENTS = np.zeros((1, 5, 12, 12, 8), np.float32)
TIMINGS = {"total_seconds": 12.5}


def make(*words: str, rows: Sequence[int] | None = None) -> request.Job:
    """Make the videos of a command, or those rows of them, one after the other."""
    job = request.load([PAGE, *words])
    for video in job.videos if rows is None else [job.videos[row] for row in rows]:
        levels = np.linspace(0, 255, job.cfg.num_frames).astype(np.uint8)
        clip = np.broadcast_to(levels[:, None, None, None], (len(levels), video.height, video.width, 3)).copy()
        with reserved(job, [video], LATENTS) as files:
            write(files, clip[None])
            files.record({}, TIMINGS)
    return job


class Parsed(html.parser.HTMLParser):
    """What a page shows of each video.

    Attributes:
      cards: of each video its `prompt`, its facts by name, and its `name`.
      links: every URL of the page.
      scripts: the number of script elements.
    """

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.cards: list[dict[str, str]] = []
        self.links: list[str] = []
        self.scripts = 0
        self._into, self._fact = "", ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.links += [url for name in ("src", "href", "poster", "data-plays") if (url := known.get(name))]
        self.scripts += tag == "script"
        if tag == "article":
            self.cards.append({"prompt": "", "name": ""})
        self._into = {"bdi": "name", "p": known.get("class") or ""}.get(tag, tag)

    def handle_endtag(self, tag: str) -> None:
        self._into = ""

    def handle_data(self, data: str) -> None:
        if self._into == "dt":
            self._fact = data
        elif self._into == "dd":
            self.cards[-1][self._fact] = data
        elif self._into in ("prompt", "name"):
            self.cards[-1][self._into] += data
