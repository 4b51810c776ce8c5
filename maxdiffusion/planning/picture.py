"""A plan as one picture: a bar of seconds for each split, its memory beside it. Imports no jax."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from maxdiffusion.planning.report import clock
from maxdiffusion.planning.results import Plan, Row

Number = float | int

_COLOURS = {"attention": "#4878a8", "linear": "#6aa56a", "other": "#c9a94f", "exposed": "#c0504d"}
_STAGES = {"text": "#b8a8d0", "denoise": "#7f6fa8", "decode": "#4d3f78"}
_NAMES, _TIME, _MEMORY, _GAP = 300, 420, 300, 90  # widths
_ROW, _TOP = 34, 96
_WIDTH = _NAMES + _TIME + _GAP + _MEMORY + _GAP


def svg(plan: Plan) -> str:
    """The picture; seconds of a denoise step on the left, GiB per device on the right with the limit as a line."""
    longest = max(row.step.total for row in plan.rows) or 1.0
    most = max(plan.gib, *(stage.gib for row in plan.rows for stage in row.stages.values()))
    memory = _NAMES + _TIME + _GAP
    height = _TOP + _ROW * len(plan.rows) + 30
    limit = memory + _MEMORY * plan.gib / most
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(12, 22, f"{plan.run} on {plan.target}", 'font-size="14" font-weight="bold"'),
        _text(_NAMES, 46, "predicted seconds of a denoise step"),
        *_legend(_NAMES, _COLOURS),
        _text(memory, 46, f"GiB per device; the line is the limit, {plan.gib:g}"),
        *_legend(memory, _STAGES),
    ]
    for index, row in enumerate(plan.rows):
        parts += _bars(row, _TOP + _ROW * index, _TIME / longest, memory, _MEMORY / most, row is plan.best)
    parts.append(_line(limit, limit, _TOP - 8, height - 24, 'stroke="#c0504d" stroke-dasharray="4 3"'))
    return "\n".join([*parts, "</svg>\n"])


def _bars(row: Row, y: Number, per_second: Number, memory: Number, per_gib: Number, best: bool) -> Iterator[str]:
    weight = 'font-weight="bold"' if best else "" if row.fits else 'fill="#999"'
    yield _text(12, y + 11, row.split, weight)
    yield _text(
        12,
        y + 25,
        f"weights {row.weights}, {row.source}{'' if row.fits else ', does not fit'}",
        'fill="#777" font-size="10"',
    )
    x = float(_NAMES)
    for part, colour in _COLOURS.items():
        width = per_second * getattr(row.step, part)
        yield _bar(x, y, width, 22, colour, f"{part} {getattr(row.step, part):.3f} s")
        x += width
    yield _text(x + 6, y + 15, f"{row.step.total:.2f} s", weight)
    low, high = (_NAMES + per_second * min(end, 2 * row.step.total) for end in (row.step.low, row.step.high))
    yield _line(low, high, y + 26, y + 26, 'stroke="#333"')
    for index, (name, colour) in enumerate(_STAGES.items()):
        gib = row.stages[name].gib
        yield _bar(memory, y + 8 * index, per_gib * gib, 7, colour, f"{name} {gib:.2f} GiB")
    yield _text(memory + per_gib * row.gib + 6, y + 15, f"{row.gib:.1f}; {clock(row.seconds.total)} in all", weight)


def _legend(x: Number, colours: dict[str, str]) -> Iterator[str]:
    for index, (name, colour) in enumerate(colours.items()):
        yield _bar(x + 90 * index, 58, 11, 11, colour, name)
        yield _text(x + 90 * index + 16, 68, name)


def _bar(x: Number, y: Number, width: Number, height: Number, colour: str, title: str) -> str:
    size = f'x="{x:.1f}" y="{y}" width="{max(width, 0):.1f}" height="{height}"'
    return f'<rect {size} fill="{colour}"><title>{escape(title)}</title></rect>'


def _line(x1: Number, x2: Number, y1: Number, y2: Number, attributes: str) -> str:
    return f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1}" y2="{y2}" {attributes}/>'


def _text(x: Number, y: Number, words: str, attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y}" {attributes}>{escape(words)}</text>'
