"""A plan as text: what to do in a few lines, then every split. Imports no jax."""

from __future__ import annotations

import shlex
import textwrap
from typing import Any

from maxdiffusion.planning.results import Plan, Row, Seconds

WIDTH = 118
# Columns of seconds of a step.
PARTS = ("attention", "linear", "other", "exposed", "hidden")


def text(plan: Plan, price: float | None) -> str:
    """The whole report; `price` is of a chip for an hour."""
    parts = [_summary(plan, price), _table(plan)]
    if plan.refused:
        parts.append("\n".join(["refused:", *(_item(f"{each.split}: {each.reason}") for each in plan.refused)]))
    parts.append("\n".join(["notes:", *map(_item, plan.notes)]))
    return "\n\n".join(parts)


def command(plan: Plan, row: Row) -> str:
    """The command line of the run on that split."""
    return " ".join(["python generate_wan.py", *map(shlex.quote, (*plan.command, *row.overrides))])


def as_json(plan: Plan, price: float | None) -> dict[str, Any]:
    """The same report as JSON; seconds, GiB."""
    rows = [
        {
            "split": row.split,
            "weights": row.weights,
            "overrides": row.overrides,
            "command": command(plan, row),
            "fits": row.fits,
            "sources": {name: stage.source for name, stage in row.stages.items()},
            "gib": {name: round(stage.gib, 3) for name, stage in row.stages.items()},
            "faults": {name: stage.fault for name, stage in row.stages.items() if stage.fault},
            "steps": row.steps,
            "step_seconds": _seconds(row.step),
            "stage_seconds": {name: _seconds(stage.seconds) for name, stage in row.stages.items()},
            "seconds": _seconds(row.seconds),
            "chip_seconds": round(plan.chips * row.seconds.total, 1),
            "price": None if price is None else round(plan.chips * row.seconds.total / 3600 * price, 4),
        }
        for row in plan.rows
    ]
    return {
        "run": plan.run,
        "target": plan.target,
        "chips": plan.chips,
        "gib_per_device": plan.gib,
        "recommended": rows[plan.rows.index(plan.best)] if plan.best else None,
        "splits": rows,
        "refused": [{"split": each.split, "reason": each.reason} for each in plan.refused],
        "changes": [{"overrides": each.words, "gib": round(each.gib, 3)} for each in plan.changes],
        "notes": plan.notes,
    }


def _summary(plan: Plan, price: float | None) -> str:
    lines = [f"{plan.run}\non {plan.target}", ""]
    if (best := plan.best) is None:
        least = min(plan.rows, key=lambda row: row.gib)
        lines.append(
            f"NOTHING FITS: the nearest split, {least.split} with weights {least.weights}, needs "
            f"{least.gib:.2f} GiB per device for {least.peak}, of {plan.gib:.4g}."
        )
        lines += ["  it would fit, by arithmetic, with"] if plan.changes else ["  and no single change would do."]
        lines += [f"    {' '.join(map(shlex.quote, each.words))}   ({each.gib:.2f} GiB)" for each in plan.changes]
        return "\n".join(lines)
    seconds, step = best.seconds, best.step
    lines += [
        f"recommended  {best.split}, weights {best.weights} ({best.source})",
        f"  {command(plan, best)}",
        f"  predicted  {number(step.total)} s a step ({number(step.low)} to {number(step.high)}); the whole run "
        f"{clock(seconds.total)} ({clock(seconds.low)} to {clock(seconds.high)}), "
        f"{plan.chips * seconds.total:,.0f} chip-seconds"
        + ("" if price is None else f", {plan.chips * seconds.total / 3600 * price:,.2f} at {price:g} a chip-hour"),
        "  of which   " + ", ".join(f"{name} {clock(stage.seconds.total)}" for name, stage in best.stages.items()),
        f"  memory     {best.gib:.2f} of {plan.gib:.4g} GiB per device at the peak, which is {best.peak} ("
        + ", ".join(f"{name} {stage.gib:.2f}" for name, stage in best.stages.items())
        + ")",
    ]
    return "\n".join(lines)


def number(seconds: float) -> str:
    """Two decimals; below 0.1 two digits."""
    return f"{seconds:.2f}" if seconds >= 0.1 or not seconds else f"{seconds:.2g}"


def clock(seconds: float) -> str:
    """Formats seconds, minutes, hours."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{int(seconds // 60)} min {seconds % 60:.0f} s"


def _table(plan: Plan) -> str:
    rows = plan.rows
    columns = {
        "split": [row.split for row in rows],
        "weights": [row.weights for row in rows],
        "s/step": [number(row.step.total) for row in rows],
        "range": [f"{number(row.step.low)}-{number(row.step.high)}" for row in rows],
        **{part: [number(getattr(row.step, part)) for row in rows] for part in PARTS},
        **{name: [f"{row.stages[name].gib:.1f}" for row in rows] for name in ("text", "denoise", "decode")},
        "fits": ["yes" if row.fits else "NO" for row in rows],
        "run": [clock(row.seconds.total) for row in rows],
        "by": [row.source for row in rows],
    }
    padded = []
    for name, cells in columns.items():
        width = max(map(len, (name, *cells)))
        align = str.ljust if name in ("split", "weights", "by") else str.rjust
        padded.append([align(cell, width) for cell in (name, *cells)])
    lines = ("  ".join(line).rstrip() for line in zip(*padded, strict=True))
    title = (
        "seconds of a step: attention + linear + other + exposed collectives, without hidden ones; GiB per device, "
        f"of {plan.gib:.4g}"
    )
    return "\n".join([title, *lines])


def _item(note: str) -> str:
    return textwrap.fill(note, WIDTH, initial_indent="  - ", subsequent_indent="    ")


def _seconds(seconds: Seconds) -> dict[str, float]:
    parts = {part: getattr(seconds, part) for part in (*PARTS, "total", "low", "high")}
    return {name: float(f"{value:.4g}") for name, value in parts.items()}
