"""What must hold between keys, checked before anything heavy is imported."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from maxdiffusion.attention.options import KernelOptions
from maxdiffusion.config import parts, schema
from maxdiffusion.config.examples import examples
from maxdiffusion.config.schema import Config
from maxdiffusion.errors import UserError
from maxdiffusion.runtime import paths
from maxdiffusion.variants import WanSpec

_TAKES_ULYSSES = ("auto", "ulysses", "ulysses_ring")
_FILE_FORMATS = tuple(name for name in get_args(schema.Format) if name != "png")


def check(cfg: Config, spec: WanSpec) -> None:
    """Runs every check.

    Raises:
      UserError: the first that fails, with the nearest legal choice.
    """
    _inputs(cfg)
    if cfg.inspect:
        return
    _sizes(cfg, spec)
    _prompts(cfg, spec)
    _control(cfg, spec)
    _experts(cfg, spec)
    _parallelism(cfg, spec)
    if cfg.plan:
        _plan(cfg)
        return
    for key in schema.group("plan"):
        if key != "plan" and not _is_default(cfg, key):
            raise UserError(f"{key} has no meaning without plan; write plan=v6e-8, or leave {key} out.")
    _hosts(cfg)
    _output(cfg)


def _sizes(cfg: Config, spec: WanSpec) -> None:
    _size(cfg.width, cfg.height, spec)
    key = "segment_frame_length" if spec.model_type == "ANIMATE" else "num_frames"
    value, step = getattr(cfg, key), spec.vae_stride[0]
    if (value - 1) % step:
        below = (value - 1) // step * step + 1
        raise UserError(
            f"{key}={value} is not of the form {step}n+1, as {spec.name} needs; "
            f"the nearest are {below} and {below + step}."
        )
    parts.of(cfg)


def _size(width: int, height: int, spec: WanSpec, where: str = "") -> None:
    for key, value, axis in (("height", height, 1), ("width", width, 2)):
        step = spec.vae_stride[axis] * spec.patch[axis]
        if value % step or not 16 <= value <= 8192:
            below = min(max(value, 0), 8192) // step * step
            near = f"{below} or {below + step}" if below else f"{step}"
            raise UserError(
                f"{where}{key}={value} is no multiple of {step}, as {spec.name} needs; the nearest are {near}."
            )


def _prompts(cfg: Config, spec: WanSpec) -> None:
    if cfg.prompts is not None:
        for key in ("save_file", "initial_latents", "decode_latents"):
            if getattr(cfg, key) is not None:
                raise UserError(f"{key} has no meaning beside prompts={cfg.prompts}; leave one of them out.")
    if cfg.decode_latents:
        return
    for key in ("prompt", "negative_prompt", "seed"):
        if not getattr(cfg, key) and not (key == "prompt" and (cfg.prompts or cfg.plan)):
            raise UserError(
                f"{key} is missing or an empty list; write {key}=... (for a prompt: prompt='a red circle')."
            )
    if not all(prompt.strip() for prompt in cfg.prompt):
        raise UserError("prompt is empty; write what the video is to show, such as prompt='a red circle'.")
    for video in examples(cfg):
        _size(video.width, video.height, spec, f"prompts={cfg.prompts}: the output {video.output} has ")


def _inputs(cfg: Config) -> None:
    if cfg.revision and paths.reach(cfg.pretrained_model_name_or_path).is_dir():
        raise UserError(
            f"revision={cfg.revision} has no meaning for the local folder {cfg.pretrained_model_name_or_path}; "
            "leave it out, or give a hub id."
        )
    if cfg.initial_latents and cfg.decode_latents:
        raise UserError(
            "initial_latents and decode_latents exclude each other: nothing is sampled when decoding; keep one."
        )
    for net in ("transformer", "transformer_2", "text_encoder", "image_encoder", "vae"):
        key = f"{net}_file"
        path = getattr(cfg, key)
        if path and not paths.reach(path).exists():
            raise UserError(f"{key}={path} does not exist; give the path of a .safetensors file.")
    for key in ("initial_latents", "decode_latents"):
        path = getattr(cfg, key)
        if path and not paths.reach(path).is_file():
            raise UserError(f"{key}={path} is no existing file; give the path of a .safetensors file of latents.")
    for key in schema.VIDEOS:
        path = getattr(cfg, key)
        if path and "://" not in path and not Path(path).exists():
            raise UserError(f"{key}={path} does not exist; give the path of a video file or of a folder of frames.")


# The keys of images and of the group `control` that each task reads, and of these the ones that it cannot do without.
_CONTROL: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "I2V": (("image", "last_image"), ("image",)),
    "FLF2V": (("image", "last_image"), ("image", "last_image")),
    "TI2V": (("image",), ()),
    "T2V": (("video", "strength"), ()),
    "VACE": (("video", "mask", "reference_images", "conditioning_scale"), ()),
    "ANIMATE": (
        (
            "image",
            "pose_video",
            "face_video",
            "mode",
            "background_video",
            "mask_video",
            "segment_frame_length",
            "prev_segment_conditioning_frames",
        ),
        ("image", "pose_video", "face_video"),
    ),
}
# key -> the key without which it has no meaning
_WITH = {"strength": "video", "mask": "video"}
_REPLACING = ("background_video", "mask_video")


def _control(cfg: Config, spec: WanSpec) -> None:
    takes, _ = _CONTROL.get(spec.model_type, ((), ()))
    images = {key: [getattr(video, key) for video in examples(cfg)] for key in ("image", "last_image")}
    given = [key for key in schema.group("control") if not _is_default(cfg, key)]
    given += [key for key, values in images.items() if any(values)]
    for key in given:
        if key not in takes:
            able = " or ".join(name for name, (keys, _) in _CONTROL.items() if key in keys)
            raise UserError(
                f"{key} has no meaning for {spec.name}, whose model_type is {spec.model_type}; leave it out, or choose "
                f"a model of type {able}."
            )
        if getattr(cfg, _WITH.get(key, key)) is None:
            raise UserError(f"{key} has no meaning without {_WITH[key]}; give both, or leave {key} out.")
        if key in _REPLACING and cfg.mode != "replace":
            raise UserError(f"{key} has no meaning with mode={cfg.mode}; write mode=replace, or leave it out.")
    if cfg.decode_latents or cfg.plan:
        return
    for key in required(cfg):
        if not (all(images[key]) if key in images else getattr(cfg, key)):
            what = "a video or a folder of frames" if key in schema.VIDEOS else "the path or URL of an image"
            raise UserError(f"{spec.name} needs {key}; write {key}=FILE, {what}.")
    if any(images["last_image"]) and cfg.num_frames == 1:
        raise UserError(f"A video of num_frames=1 cannot end with another image; write num_frames={spec.num_frames}.")


def required(cfg: Config) -> tuple[str, ...]:
    """The keys of images and videos that its task cannot do without."""
    _, needs = _CONTROL.get(cfg.model_type, ((), ()))
    return (*needs, *(_REPLACING if cfg.mode == "replace" else ()))


def _experts(cfg: Config, spec: WanSpec) -> None:
    for key in ("guidance_scale_2", "boundary_ratio", "expert_residency"):
        if spec.boundary_ratio is None and not _is_default(cfg, key):
            raise UserError(f"{key} has no meaning for {spec.name}, which has one expert; leave it out.")


def _is_default(cfg: Config, key: str) -> bool:
    default = Config.model_fields[key].default
    return getattr(cfg, key) in (default, (default,))


def _parallelism(cfg: Config, spec: WanSpec) -> None:
    for level in ("ici", "dcn"):
        filling = [key for key in Config.model_fields if key.startswith(f"{level}_") and getattr(cfg, key) == -1]
        if len(filling) > 1:
            raise UserError(
                f"{' and '.join(filling)} are both -1, but only one can take the devices left; set one of them."
            )
    KernelOptions.read(cfg)
    shards = cfg.ulysses_shards
    if shards == -1:
        return
    if shards > 1 and cfg.attention not in _TAKES_ULYSSES:
        raise UserError(
            f"ulysses_shards={shards} has no meaning for attention={cfg.attention}; "
            f"write ulysses_shards=1 or attention={' or '.join(_TAKES_ULYSSES[1:])}."
        )
    counted = {}
    if spec.dims:
        counted[f"the {spec.dims.num_attention_heads} heads of {spec.name}"] = spec.dims.num_attention_heads
    if -1 not in (cfg.ici_context_parallelism, cfg.dcn_context_parallelism):
        context = cfg.ici_context_parallelism * cfg.dcn_context_parallelism
        counted[f"the context axis of {context} devices"] = context
    for what, number in counted.items():
        if number % shards:
            legal = [str(n) for n in range(1, number + 1) if all(other % n == 0 for other in counted.values())]
            raise UserError(f"ulysses_shards={shards} does not divide {what}; choose {' or '.join(legal)}.")


def _hosts(cfg: Config) -> None:
    address, count, index = cfg.coordinator_address, cfg.num_processes, cfg.process_id
    if (count is None) != (index is None) or (count is not None and address is None):
        raise UserError(
            "coordinator_address, num_processes and process_id say together which processes make one run; give all "
            "three, or none and let the launcher say so."
        )
    if address is not None and not re.fullmatch(r"(\[[\da-fA-F:.]+\]|[^\s:/]+):\d{1,5}", address):
        raise UserError(f"coordinator_address={address} is not HOST:PORT; write for example 10.0.0.2:8476.")
    if count is not None and index is not None and index >= count:
        raise UserError(
            f"process_id={index} is none of num_processes={count} processes, which count from 0; the last is "
            f"{count - 1}."
        )


def _plan(cfg: Config) -> None:
    if cfg.verify:
        raise UserError("plan and verify exclude each other: a plan runs nothing; keep one of them.")
    for file in cfg.plan_file:
        path = paths.parse(file)
        if path.suffix.lower() not in (".json", ".svg"):
            raise UserError(f"plan_file={file} is neither .json nor .svg; name it {path.with_suffix('.json')}.")
        if path.is_dir():
            raise UserError(f"plan_file={file} is a folder; name a file, such as {path / 'plan.json'}.")
        if path.exists() and not cfg.overwrite:
            raise UserError(f"plan_file={file} exists already; name another, or write overwrite=true.")
        _writable(path.parent, "plan_file")


def _output(cfg: Config) -> None:
    if cfg.process_id:  # process 0 alone writes, perhaps to a disk that only it has
        return
    if cfg.save_file is None:
        folder = paths.parse(cfg.output_dir)
        _writable(folder / cfg.run_name, "output_dir")
        _one_file(cfg, folder)
        return
    path, frames = paths.parse(cfg.save_file), cfg.output_format == "png"
    _one_file(cfg, path)
    count = 1 if cfg.decode_latents else len(examples(cfg))
    if count > 1:
        raise UserError(
            f"save_file names one file, but {count} videos are asked for; leave it out, "
            "and they are named below output_dir/run_name."
        )
    if path.name in ("", "..") or (not frames and (cfg.save_file.endswith("/") or path.is_dir())):
        raise UserError(f"save_file={cfg.save_file} is a folder; name a file, such as {path / 'video'}.mp4.")
    suffix = path.suffix.lower().lstrip(".")
    if suffix in _FILE_FORMATS if frames else suffix != cfg.output_format:
        raise UserError(
            f"save_file={cfg.save_file} does not have the extension of output_format={cfg.output_format}; "
            f"name it {path.with_suffix('' if frames else '.' + cfg.output_format)}."
        )
    _writable(path.parent, "save_file")
    stem = path.name if frames else path.stem
    besides = [".json"] if cfg.decode_latents else [".json", ".latents.safetensors"]
    for other in (path, *(path.with_name(stem + ending) for ending in besides)):
        if other.exists() and not cfg.overwrite:
            raise UserError(f"{other} exists already; name another save_file, or write overwrite=true.")


def _one_file(cfg: Config, path: paths.AnyPath) -> None:
    if cfg.output_format == "png" and not isinstance(path, Path):
        raise UserError(
            f"output_format=png is a folder of frames, which {path} cannot take as a whole; choose webp, npy or mp4."
        )


def _writable(folder: paths.AnyPath, key: str) -> None:
    """Whether files can be made in `folder`, which need not exist yet; tried for real, leaving nothing behind."""
    if not isinstance(folder, Path):
        try:
            paths.check_writable(folder)
        except OSError as error:
            raise UserError(f"{key}: {folder} cannot be written ({error.strerror or error}); choose another.") from None
        return
    existing = folder.absolute()
    try:
        while not existing.exists():
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"{key}: the folder {folder} cannot be written ({existing}: {error.strerror}); choose another."
        ) from None
