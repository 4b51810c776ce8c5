"""The table of `generate_wan list`, made from the bundled pages."""

from __future__ import annotations

from pathlib import Path

from maxdiffusion import variants
from maxdiffusion.config import pages, schema
from maxdiffusion.config.parse import Values, parse
from maxdiffusion.variants import WanSpec

_HEADER = ("page", "type", "needs [takes]", "steps", "video", "GB", "checkpoint")
_NOTE = """\
GB: weights of the checkpoint at two bytes a parameter, twice that if its files are float32; of bundled ones, the files.
--help PAGE shows a page."""


def text(word: str = "") -> str:
    """One line for each page whose name contains `word`: its task, inputs, steps, video, size and checkpoint."""
    rows = [_HEADER, *(_row(name) for name in pages.names() if word in name)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", _NOTE])


def _row(name: str) -> tuple[str, ...]:
    values = parse([name])
    spec = variants.get(values["model_name"].value)
    given = values.get("pretrained_model_name_or_path")
    checkpoint = str(given.value if given else spec.hub_id)
    gigabytes = f"{2 * spec.billions:.0f}" if spec.billions else ""
    if (folder := Path(checkpoint)).is_dir():
        stored = sum(file.stat().st_size for net in spec.nets for file in (folder / net).glob("*.safetensors"))
        checkpoint, gigabytes = "bundled", f"{stored / 1e9:.3f}"
    width, height, frames = (_value(values, spec, key) for key in ("width", "height", "num_frames"))
    video = f"{width}x{height}, {frames} frames"
    return name, spec.model_type, _inputs(values, spec), _steps(values, spec), video, gigabytes, checkpoint


def _value(values: Values, spec: WanSpec, key: str) -> str:
    return str(values[key].value if key in values else getattr(spec, key))


def _steps(values: Values, spec: WanSpec) -> str:
    if "sigmas" in values:
        return str(len(values["sigmas"].value))
    more = f" + {values['num_inference_steps_2'].value}" if "num_inference_steps_2" in values else ""
    return _value(values, spec, "num_inference_steps") + more


def _inputs(values: Values, spec: WanSpec) -> str:
    """The inputs that the page leaves to the user, then those that it or the variant has a default for, in brackets."""
    keys = ["prompt", *(key for key in spec.task.takes if schema.KEYS[key].path)]
    needed = [key for key in keys if key in ("prompt", *spec.task.needs) and key not in values]
    needed = [key for key in needed if not (key == "prompt" and spec.prompt)]
    more = [key for key in keys if key not in needed]
    return " ".join([*needed, *([f"[{' '.join(more)}]"] if more else [])])
