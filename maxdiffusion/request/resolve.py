"""Resolves values to a run: the variant, its defaults, the size of an image, then every check. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maxdiffusion import variants
from maxdiffusion.config import parse, schema
from maxdiffusion.config.parse import Value, Values, parse_words, typed
from maxdiffusion.config.schema import Config
from maxdiffusion.conventions import CONVENTIONS, OFFICIAL, Conventions
from maxdiffusion.errors import UserError
from maxdiffusion.media.fetch import open_image
from maxdiffusion.media.sizes import Proportions, own, rounded
from maxdiffusion.request import audio, checks, clips, few_step, prompt_file, videos
from maxdiffusion.request.job import Job
from maxdiffusion.request.segments import Segments
from maxdiffusion.runtime import paths
from maxdiffusion.weights import dimensions, hub
from maxdiffusion.weights.checkpoint import official_layout
from maxdiffusion.weights.headers import read_json


def load(argv: Sequence[str]) -> Job:
    """The run of a command line without the program's name.

    Raises:
      UserError: anything that can be seen to be wrong before weights are loaded.
    """
    return resolve(parse(argv))


def resolve(values: Values) -> Job:
    """The run of these values.

    Raises:
      UserError: anything that can be seen to be wrong before weights are loaded.
    """
    values = dict(values)
    spec, transformer = _variant(values)
    _apply_checkpoint(values, spec)
    proportions = _apply_size(values, spec)
    as_long = "num_frames" not in values and spec.task.as_long_as
    for key, (value, origin) in _defaults(spec, values).items():
        values.setdefault(key, Value(value, origin))
    cfg = _with_line_keys(values, typed(values))
    checks.check_keys(cfg, spec)
    if as_long and getattr(cfg, as_long) and not cfg.inspect and (length := _length(as_long, cfg, spec)):
        values["num_frames"] = length
        cfg = _with_line_keys(values, typed(values))
    job = dataclasses.replace(job_of(cfg, proportions), transformer=transformer)
    on_mesh(job, cfg.verify_against)  # refused now rather than after the first mesh has run
    if cfg.compare and (other := "plan" if cfg.plan else "verify" if cfg.verify else ""):
        raise UserError(f"compare and {other} exclude each other; keep one of them.")
    for words in cfg.compare:
        with_words(job, words)
    return job


def _with_line_keys(values: Values, cfg: Config) -> Config:
    """The config with the keys of the model that the lines of its prompt file give.

    Raises:
      UserError: two lines ask for different ones.
    """
    lines = prompt_file.read(cfg.prompts) if cfg.prompts and not cfg.inspect else []
    if not any(key in fields for _, fields in lines for key in prompt_file.OF_THE_RUN):
        return cfg
    asked = []
    for where, fields in lines:
        given = {key: Value(fields[key], where) for key in prompt_file.OF_THE_RUN if key in fields}
        asked.append(typed({**values, **given}))
        for key in prompt_file.OF_THE_RUN:
            first, this = getattr(asked[0], key), getattr(asked[-1], key)
            if first != this:
                raise UserError(
                    f"{where} asks for {key}={this or 'none'} and {lines[0][0].rpartition(', ')[2]} for "
                    f"{first or 'none'}, but the videos of a run share one model; make a prompt file for each."
                )
    return asked[0]


def job_of(cfg: Config, proportions: Proportions | None = None) -> Job:
    """The run of a complete config; `proportions` as in `videos.read`.

    Raises:
      UserError: as `checks.check_job`, or the videos or their segments cannot be made.
    """
    spec = variants.get(cfg.model_name)
    if cfg.inspect:
        return Job(cfg, spec, (), Segments(cfg.num_frames, cfg.num_frames))
    job = Job(cfg, spec, videos.read(cfg, proportions), _segments(cfg, spec))
    checks.check_job(job)
    return job


def _segments(cfg: Config, spec: variants.WanSpec) -> Segments:
    task = spec.task
    before = task.reference_frames + len(cfg.reference_images)
    if task.segmented:
        overlap = cfg.prev_segment_conditioning_frames if "prev_segment_conditioning_frames" in task.takes else 0
        return Segments(cfg.num_frames, cfg.segment_frame_length, overlap, before, task.dropped)
    return clips.segments(cfg, before)


def with_keys(job: Job, **keys: Any) -> Job:
    """The same run with other keys; a new size is that of all videos.

    Raises:
      UserError: its segments cannot be made.
    """
    cfg = job.cfg.model_copy(update=keys)
    size = {side: keys[side] for side in ("width", "height") if side in keys}
    videos = tuple(dataclasses.replace(video, **size) for video in job.videos)
    return dataclasses.replace(job, cfg=cfg, videos=videos, segments=_segments(cfg, job.spec))


# Groups whose keys a variant of `compare` may change: how the video is made, not what it shows.
_OF_A_VARIANT = ("model", "sampling", "dtypes", schema.PARALLELISM, "runtime")


def with_words(job: Job, words: str) -> Job:
    """The same video made in another way: key=value arguments, separated by blanks, override the run's own.

    Raises:
      UserError: a key decides what the video shows or where it is written, or a value that `load` would refuse.
    """
    if len(job.videos) != 1 or job.cfg.prompts or job.cfg.decode_latents:
        raise UserError("compare is of one video; give one prompt and one seed, and no prompts or decode_latents.")
    values = parse_words(shlex.split(words))
    for key in values:
        if key in schema.KEYS and schema.KEYS[key].group not in _OF_A_VARIANT:
            raise UserError(
                f"compare cannot change {key}, as it compares ways to make one video; give keys such as cache=sea."
            )
    cfg = typed(values, job.cfg.model_dump())
    checks.check_keys(cfg, job.spec)
    varied = dataclasses.replace(job, cfg=cfg)
    checks.check_job(varied)
    return varied


def on_mesh(job: Job, words: Sequence[str]) -> Job:
    """The same run on another mesh: arguments of the group "attention and parallelism" override its own.

    Raises:
      UserError: a key of another group, or a value that `load` would refuse.
    """
    values = parse_words(words)
    for key in values:
        if key not in schema.KEYS or schema.KEYS[key].group != schema.PARALLELISM:
            raise UserError(f"{key} is not a key of {schema.PARALLELISM}, so that a second mesh cannot change it.")
    cfg = typed(values, job.cfg.model_dump())
    checks.check_parallelism(cfg, job.spec)
    return dataclasses.replace(job, cfg=cfg)


def _apply_size(values: Values, spec: variants.WanSpec) -> Proportions | None:
    """Makes width and height in the proportions of the (first) image or video.

    `size=auto`, the default where one is given, has the variant's area; `size=W*H` is an area by the official
    conventions, where the task says so. A video that is extended keeps its own size instead.

    Returns:
      What decides the sizes of a prompt file's images; None where no image does.
    """
    size, extends = values.pop("size", None), bool(_text(values, "extend"))
    key = "extend" if extends else spec.task.shaped_by
    auto = size if size and size.value == "auto" else None
    sides = [values[side] for side in ("width", "height") if side in values]
    if auto and sides:
        raise UserError(f"size=auto and a width or height ({auto.origin}) contradict each other; keep one of them.")
    conventions = _conventions(values)
    is_area = conventions.size == "area" and spec.task.size_is_area and not extends
    area, why = None if sides else spec.width * spec.height, "size=auto"
    if size and is_area and not auto:
        area = math.prod(int(side.value) for side in sides)
        why = f"{size.origin}, size={size.value} is an area with conventions={conventions.name}"
    rule = own if extends else spec.task.official_size if conventions.size == "area" else rounded
    proportions = Proportions(rule, spec.size_step, area)
    entry = values[key].value if key in values else []
    location = entry if isinstance(entry, str) else next(iter(entry), None)
    if auto and not location:
        raise UserError(f"size=auto ({auto.origin}) takes the proportions of {key}, which is not given.")
    if area and location:
        found = _size_of(key, location)
        for side, pixels in zip(("width", "height"), proportions.size(area, found), strict=True):
            values[side] = Value(str(pixels), f"{why}, {key} {location} has {found[0]} x {found[1]} pixels")
    return proportions if is_area and key == "image" else None


def _conventions(values: Values) -> Conventions:
    return CONVENTIONS.get(_text(values, "conventions") or OFFICIAL.name, OFFICIAL)


def _apply_checkpoint(values: Values, spec: variants.WanSpec) -> None:
    """The recipe that a few-step checkpoint asks for; keys that are given win, and those of noise levels win together.

    Of a hub id, model_index.json is fetched, where the run would fetch its files as well.
    """
    path = _text(values, "pretrained_model_name_or_path")
    if path in (None, spec.hub_id) or all(key in values for key in few_step.KEYS):
        return
    fetch = not any(_text(values, key) for key in ("plan", "inspect"))
    wanted = few_step.asked(hub.model_index(path, _text(values, "revision"), fetch), path)
    if any(key in values for key in ("num_inference_steps", "flow_shift", "sigmas")):
        wanted.pop("sigmas", None)
    for key, (value, origin) in wanted.items():
        values.setdefault(key, Value(value, origin))


def _size_of(key: str, location: str) -> tuple[int, int]:
    """Width and height of an image or a video."""
    if key == "image":
        return open_image(location).size
    from maxdiffusion.media.read import probe  # numpy, which no other check needs

    video = probe(location)
    return video.width, video.height


def _length(key: str, cfg: Config, spec: variants.WanSpec) -> Value | None:
    """As many frames as a video shows or a sound fills at `fps`; None of a still image.

    Raises:
      UserError: it cannot be read, or a sound fills no frame or more than a video may have.
    """
    path = getattr(cfg, key)
    if key == "audio":
        from maxdiffusion.media.samples import seconds

        lasts = seconds(path)
        return Value(str(audio.frames(cfg, lasts, spec.task.dropped)), f"the length of audio {path}")
    from maxdiffusion.media.read import read_clip, times  # numpy, as above

    most = schema.MAX_FRAMES + 1
    at = times(most, cfg.fps) if cfg.input_frames == "timed" else range(most)
    clip = read_clip(path, at, lambda frame: frame[:1, :1])
    return None if clip.still else Value(str(len(clip.frames)), f"the length of {key} {path}")


# ---- the variant and its defaults


def _variant(values: Values) -> tuple[variants.WanSpec, Mapping[str, Any] | None]:
    """The variant, and `Job.transformer`: the one named, or the one of the named family that the checkpoint is of."""
    named = values.get("model_name", Value(schema.default("model_name"), "default"))
    name = _text(values, "model_name") or str(named.value)
    found = variants.candidates(name, _text(values, "model_type"))
    path = _text(values, "pretrained_model_name_or_path")
    file = _text(values, "transformer_file")
    stored = checkpoint = _transformer_config(path, file) if path else None
    if file:
        path, checkpoint = file, dimensions.read_config(paths.probe(file), checkpoint or {})
    if len(found) == 1:
        if checkpoint is not None:
            variants.check(found[0], checkpoint)
        values["model_name"] = dataclasses.replace(named, value=found[0].name)
        return found[0], stored
    if checkpoint is not None:
        found = variants.matching(checkpoint, found) or found
    spec = found[0] if len(found) == 1 else _by_hub_id(path, found)
    if spec is None:
        names = ", ".join(each.name for each in found)
        what = f"the checkpoint {path} does not tell which" if path else "no checkpoint is given that tells which"
        raise UserError(f"model_name {name} stands for several variants and {what}; write model_name: one of {names}.")
    values["model_name"] = Value(spec.name, f"family {name}, identified by {path}")
    return spec, stored


def _text(values: Values, key: str) -> str | None:
    value = values[key].value if key in values else None
    if value is not None and not isinstance(value, str):
        raise UserError(f"{key} ({values[key].origin}) is a list, but it takes one value.")
    return value


def _by_hub_id(path: str | None, found: Sequence[variants.WanSpec]) -> variants.WanSpec | None:
    """The variant with that hub id, or with a hub id that ends in the folder's name."""
    ids = {spec.hub_id.lower(): spec for spec in found if spec.hub_id}
    folders = {each.partition("/")[2]: spec for each, spec in ids.items()}
    given = (path or "").lower()
    return ids.get(given) or folders.get(os.path.basename(given.rstrip("/")))


def _transformer_config(path: str, file: str | None) -> Mapping[str, Any] | None:
    """transformer/config.json of a local checkpoint; None for a hub id, whose files are checked once they are here.

    Beside a `transformer_file` it may be absent.
    """
    folder = paths.probe(path)
    if isinstance(folder, Path) and not folder.is_dir():
        if folder.is_file():
            raise UserError(
                f"pretrained_model_name_or_path={path} is a file; give a folder or a hub id, and a transformer in one "
                f"file as transformer_file={path}."
            )
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
            raise UserError(
                f"pretrained_model_name_or_path={path} is neither an existing folder nor a hub id of the form "
                "organisation/name; give one of the two."
            )
        return None
    config = folder / "transformer" / "config.json"
    if not config.is_file():
        if file:
            return None
        raise UserError(
            official_layout(folder)
            or f"The checkpoint {path} has no transformer/config.json; "
            "give the folder of a checkpoint in the diffusers layout."
        )
    return dimensions.renamed(read_json(config))


def _defaults(spec: variants.WanSpec, values: Values) -> Mapping[str, tuple[Any, str]]:
    """What follows from the variant and from other keys: key -> (value, origin)."""
    origin = f"variant {spec.name}"
    own = {key: getattr(spec, key) for key, about in schema.KEYS.items() if about.from_variant}
    result = {key: (value, origin) for key, value in own.items() if value is not None}
    result["run_name"] = (spec.name, origin)
    if spec.flow_shift_480p is not None and _pixels(spec, values) <= 832 * 480:
        result["flow_shift"] = (spec.flow_shift_480p, f"{origin} up to 832 x 480 pixels")
    conventions = _conventions(values)
    if spec.task.spread and "video" in values and conventions.control_frames == "spread":
        result["input_frames"] = ("spread", f"{spec.task.name} with conventions={conventions.name}")
    if spec.guidance_scale_2 is not None and "guidance_scale" in values:  # as both references read one scale
        result["guidance_scale_2"] = (values["guidance_scale"].value, "guidance_scale")
    if "sigmas" in values and (levels := values["sigmas"].value) not in ("", []):
        result["num_inference_steps"] = (len(levels) if isinstance(levels, list) else 1, "sigmas")
        result["flow_shift"] = (1.0, "sigmas")  # they are levels already
    if "num_inference_steps_2" in values:
        result["flow_shift_2"] = values.get("flow_shift", Value(*result["flow_shift"])).value, "flow_shift"
    if _text(values, "prompts"):
        result["gallery"] = (True, "prompts")
    if "boundary_step" in values:
        result.pop("boundary_ratio", None)
    if "pretrained_model_name_or_path" not in values:
        if spec.hub_id is None:
            raise UserError(
                f"The variant {spec.name} has no official checkpoint; give pretrained_model_name_or_path=FOLDER."
            )
        result["pretrained_model_name_or_path"] = (spec.hub_id, origin)
    if _text(values, "jax_distributed") != "off":
        for key in ("coordinator_address", "num_processes", "process_id"):
            if value := os.environ.get(f"JAX_{key.upper()}"):
                result[key] = (value, f"environment, JAX_{key.upper()}")
    extension = os.path.splitext(_text(values, "save_file") or "")[1].lower().lstrip(".")
    if extension:
        names = schema.KEYS["output_format"].values
        result["output_format"] = (names.get(extension, extension), "save_file")
    return result


def _pixels(spec: variants.WanSpec, values: Values) -> float:
    """Pixels of a frame; infinite for sides that are not numbers, which the schema will refuse."""
    sides = (values[side].value if side in values else getattr(spec, side) for side in ("width", "height"))
    try:
        return float(math.prod(map(int, sides)))
    except (TypeError, ValueError):
        return math.inf
