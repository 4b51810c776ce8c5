"""Checks between keys, made once, before anything heavy is imported."""

from __future__ import annotations

import contextlib
import math
import re
import shutil
from pathlib import Path
from typing import get_args

from maxdiffusion import variants
from maxdiffusion.config import schema
from maxdiffusion.config.schema import Config
from maxdiffusion.errors import UserError
from maxdiffusion.request import audio, clips, half_size
from maxdiffusion.request.job import Job, kernel_options
from maxdiffusion.runtime import paths
from maxdiffusion.variants import WanSpec
from maxdiffusion.weights import net_file

_TAKES_ULYSSES = ("auto", "ulysses", "ulysses_ring")
_FILE_FORMATS = tuple(name for name in get_args(schema.Format) if name != "png")  # png of several frames is a folder


def check_keys(cfg: Config, spec: WanSpec) -> None:
    """Checks that do not need the videos of the run.

    Raises:
      UserError: the first that fails, with the nearest legal choice.
    """
    _inputs(cfg)
    _loras(cfg, spec)
    if cfg.inspect:
        if cfg.plan or cfg.verify:
            raise UserError(f"inspect and {'plan' if cfg.plan else 'verify'} exclude each other; keep one of them.")
        return
    _needs(cfg, spec)
    _frames(cfg, spec)
    clips.check(cfg, spec)
    audio.check(cfg)
    _size(cfg.width, cfg.height, spec)
    _prompts(cfg)
    _experts(cfg, spec)
    _levels(cfg)
    check_parallelism(cfg, spec)


def check_job(job: Job) -> None:
    """Checks of the videos to make and of their files.

    Raises:
      UserError: the first that fails, with the nearest legal choice.
    """
    cfg = job.cfg
    for video in job.videos if cfg.prompts and not cfg.decode_latents else ():
        _size(video.width, video.height, job.spec, f"prompts={cfg.prompts}, output {video.output}: ")
    _control(job)
    _windows(job)
    if cfg.cache != "none" or cfg.calibrate_cache:
        from maxdiffusion.request import caching  # numpy, which no other check needs

        caching.check(job)
    if cfg.low_resolution_steps is not None:
        half_size.check(job)
    if cfg.plan:
        _plan(cfg)
        return
    _hosts(cfg)
    if not job.hosts.may_join() or cfg.process_id == 0:  # else after the processes have joined
        check_output(job)


def _needs(cfg: Config, spec: WanSpec) -> None:
    """Checks keys that are only used with another one (`Key.needs`)."""
    for key, about in schema.KEYS.items():
        if about.group == "control" and key not in spec.task.takes:
            continue  # refused below, whatever is beside it
        name = about.needs.partition("=")[0]
        if name and not schema.is_default(cfg, key) and schema.is_default(cfg, name):
            raise UserError(f"{key} is only used with {about.needs}; add that, or leave {key} out.")
    if not schema.is_default(cfg, "input_frames") and not any(getattr(cfg, key) for key in schema.videos()):
        raise UserError("input_frames is only used with an input video, and none is given; leave it out.")


def _frames(cfg: Config, spec: WanSpec) -> None:
    key = "segment_frame_length" if spec.task.segmented else "num_frames"
    value, step, first = getattr(cfg, key), spec.vae_stride[0], 0 if spec.task.dropped else 1
    if (value - first) % step:
        below = (value - first) // step * step + first
        near = f"are {below} and {below + step}" if below else f"is {step}"
        form = f"{step}n+{first}" if first else f"{step}n"
        raise UserError(f"{key}={value} is not of the form {form}, as {spec.name} needs; the nearest {near}.")
    if cfg.output_format == "jpg" and cfg.num_frames > 1:
        raise UserError(
            f"output_format=jpg is one picture, and num_frames={cfg.num_frames}; write num_frames=1, or choose mp4 or, "
            "for a folder of frames, png."
        )


def _size(width: int, height: int, spec: WanSpec, where: str = "") -> None:
    for key, value, axis in (("height", height, 1), ("width", width, 2)):
        step = spec.vae_stride[axis] * spec.patch[axis]
        if value % step or not 16 <= value <= 8192:
            below = min(max(value, 0), 8192) // step * step
            near = f"{below} or {below + step}" if below else f"{step}"
            raise UserError(
                f"{where}{key}={value} is not a multiple of {step}, as {spec.name} needs; the nearest are {near}."
            )


def _prompts(cfg: Config) -> None:
    if cfg.prompts is not None:
        for key in ("save_file", "initial_latents", "decode_latents"):
            if getattr(cfg, key) is not None:
                raise UserError(f"{key} is not used beside prompts={cfg.prompts}; leave one of them out.")
    if cfg.decode_latents:
        return
    for key in ("prompt", "negative_prompt", "seed"):
        if not getattr(cfg, key) and not (key == "prompt" and (cfg.prompts or cfg.plan or cfg.clip_prompts)):
            raise UserError(
                f"{key} is missing or an empty list; write {key}=... (for a prompt: prompt='a red circle')."
            )
    if not all(prompt.strip() for prompt in cfg.prompt):
        raise UserError("prompt is empty; write what the video is to show, such as prompt='a red circle'.")


def _inputs(cfg: Config) -> None:
    if cfg.revision and paths.probe(cfg.pretrained_model_name_or_path).is_dir():
        raise UserError(
            f"revision={cfg.revision} is not used for the local folder {cfg.pretrained_model_name_or_path}; "
            "leave it out, or give a hub id."
        )
    if cfg.initial_latents and cfg.decode_latents:
        raise UserError(
            "initial_latents and decode_latents exclude each other: nothing is sampled when decoding; keep one."
        )
    for net in net_file.KINDS:
        if path := getattr(cfg, f"{net}_file"):
            net_file.read(paths.probe(path), net)  # before a checkpoint is fetched
    for key in ("initial_latents", "decode_latents"):
        path = getattr(cfg, key)
        if path and not paths.probe(path).is_file():
            raise UserError(f"{key}={path} is not an existing file; give the path of a .safetensors file of latents.")
    for key in schema.videos():
        path = getattr(cfg, key)
        if path and "://" not in path and not Path(path).exists():
            raise UserError(f"{key}={path} does not exist; give the path of a video file or of a folder of frames.")


def _loras(cfg: Config, spec: WanSpec) -> None:
    if spec.boundary_ratio is None:
        if cfg.lora_2:
            raise UserError(f"lora_2 is not used by {spec.name}, which has one expert; give the file as lora.")
        return
    for key, own, other in (("lora", "high", "low"), ("lora_2", "low", "high")):
        for location in getattr(cfg, key):
            named = set(re.findall(r"(high|low)[-_ ]?noise", location.rpartition("/")[2].lower()))
            if named == {other}:
                raise UserError(
                    f"{key}={location} is named {other} noise, but {key} is merged into the {own}-noise expert; "
                    f"give it as {'lora_2' if key == 'lora' else 'lora'}, or rename the file if it is meant."
                )


def _control(job: Job) -> None:
    """Checks images and the group `control`: unused keys and missing ones."""
    cfg, task = job.cfg, job.spec.task
    images = {key: [getattr(video, key) for video in job.videos] for key in ("image", "last_image")}
    given = [key for key in schema.group("control") if not schema.is_default(cfg, key)]
    for key in (*given, *(key for key, values in images.items() if any(values))):
        if key not in task.takes:
            able = dict.fromkeys(spec.model_type for spec in variants.VARIANTS.values() if key in spec.task.takes)
            raise UserError(
                f"{key} is not used by {job.spec.name}, whose model_type is {task.name}; leave it out, or choose "
                f"a model of type {' or '.join(able)}."
            )
    if cfg.decode_latents and task.dropped and not all(images["image"]):
        raise UserError(f"{job.spec.name} decodes latents after those of its image; write image=FILE.")
    if cfg.decode_latents or cfg.plan:
        return
    clips.check_images(cfg, task, images["image"])
    for key in required(cfg, job.spec):
        if key == "image" and cfg.extend:
            continue  # its frames stand for the image
        if not (all(images[key]) if key in images else getattr(cfg, key)):
            what = "a video or a folder of frames" if schema.KEYS[key].is_video else "the path or URL of an image"
            what = "the path or URL of a sound, or of a video that has one" if key == "audio" else what
            raise UserError(f"{job.spec.name} needs {key}; write {key}=FILE, {what}.")
    if any(images["last_image"]) and cfg.num_frames == 1:
        raise UserError(
            f"A video of num_frames=1 cannot end with another image; write num_frames={job.spec.num_frames}."
        )


def _windows(job: Job) -> None:
    """Checks `context_window` and `context_overlap`."""
    cfg, spec, step = job.cfg, job.spec, job.spec.vae_stride[0]
    if (window := cfg.context_window) is None:
        return
    if not spec.task.windowed:
        able = dict.fromkeys(other.model_type for other in variants.VARIANTS.values() if other.task.windowed)
        raise UserError(
            f"context_window is not used by {spec.name}, whose model_type is {spec.model_type}; leave it out, or "
            f"choose a model of type {' or '.join(able)}."
        )
    started = any(video.images for video in job.videos)
    if started or (job.chained and "image" in spec.task.takes):
        what = "an image" if started else "extend"
        raise UserError(
            f"context_window={window} and {what} exclude each other: only the first window could start from given "
            "frames; leave one of them out."
        )
    if (window - 1) % step:
        below = (window - 1) // step * step + 1
        raise UserError(
            f"context_window={window} is not of the form {step}n+1, as {spec.name} needs; the nearest are {below} and "
            f"{below + step}."
        )
    if window > cfg.num_frames:
        raise UserError(
            f"context_window={window} is longer than the video of num_frames={cfg.num_frames}; leave it out, or write "
            "less."
        )
    overlap, most = cfg.context_overlap, window - 1
    if overlap % step or overlap > most:
        near = sorted({min(overlap // step * step, most), min(-(-overlap // step) * step, most)})
        raise UserError(
            f"context_overlap={overlap} is not a multiple of {step} below context_window={window}; the nearest "
            f"{'are' if len(near) > 1 else 'is'} {' and '.join(map(str, near))}."
        )


def required(cfg: Config, spec: WanSpec) -> tuple[str, ...]:
    """The required keys of images and videos of a run."""
    mode = [key for key, about in schema.KEYS.items() if about.needs == f"mode={cfg.mode}"]
    return (*spec.task.needs, *mode)


def _experts(cfg: Config, spec: WanSpec) -> None:
    for key in (
        "guidance_scale_2",
        "boundary_ratio",
        "boundary_step",
        "num_inference_steps_2",
        "flow_shift_2",
        "expert_residency",
    ):
        if spec.boundary_ratio is None and not schema.is_default(cfg, key):
            raise UserError(f"{key} is not used by {spec.name}, which has one expert; leave it out.")
    if cfg.boundary_step is not None:
        for key in ("boundary_ratio", "num_inference_steps_2"):
            if getattr(cfg, key) is not None:
                raise UserError(
                    f"boundary_step={cfg.boundary_step} and {key}={getattr(cfg, key)} both say where the experts "
                    "change; keep one of them."
                )
        if cfg.boundary_step > cfg.num_inference_steps:
            raise UserError(
                f"boundary_step={cfg.boundary_step} is more than the {cfg.num_inference_steps} steps of the run; it "
                f"must be 0 to {cfg.num_inference_steps}, of which the ends leave one expert out."
            )


def _levels(cfg: Config) -> None:
    """Checks of the noise levels that the keys give, before any schedule is made."""
    if cfg.num_inference_steps_2 is not None and cfg.boundary_ratio in (0, 1):
        raise UserError(
            f"boundary_ratio={cfg.boundary_ratio:g} leaves one of the experts without noise levels; with "
            "num_inference_steps_2 it must lie between 0 and 1, such as 0.875."
        )
    if not cfg.sigmas:
        return
    if cfg.num_inference_steps_2 is not None:
        raise UserError(
            "sigmas are the levels of the whole run, so that num_inference_steps_2 is not used beside them; leave it "
            "out, and write boundary_step for the number of levels of the high-noise expert."
        )
    if cfg.num_inference_steps != len(cfg.sigmas):
        raise UserError(
            f"num_inference_steps={cfg.num_inference_steps} is not the number of sigmas, which is {len(cfg.sigmas)}; "
            "leave it out."
        )
    if cfg.flow_shift != 1:
        raise UserError(
            f"flow_shift={cfg.flow_shift:g} is not used beside sigmas, which are the shifted levels; leave it out."
        )
    from maxdiffusion.denoise.schedule import explicit_levels  # numpy, which no other check needs

    explicit_levels(cfg.sigmas)


def check_parallelism(cfg: Config, spec: WanSpec) -> None:
    """The group "attention and parallelism", as far as it can be checked without devices.

    Raises:
      UserError: degrees that cannot multiply, options that no kernel takes.
    """
    for level in ("ici", "dcn"):
        filling = [key for key in Config.model_fields if key.startswith(f"{level}_") and getattr(cfg, key) == -1]
        if len(filling) > 1:
            raise UserError(
                f"{' and '.join(filling)} are both -1, but only one can take the devices left; set one of them."
            )
    kernel_options(cfg)
    shards = cfg.ulysses_shards
    if shards == -1:
        return
    if shards > 1 and cfg.attention not in _TAKES_ULYSSES:
        raise UserError(
            f"ulysses_shards={shards} is not used by attention={cfg.attention}; "
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
            "coordinator_address, num_processes and process_id define the processes of a run together; give all "
            "three, or none under a launcher."
        )
    if address is not None and not re.fullmatch(r"(\[[\da-fA-F:.]+\]|[^\s:/]+):\d{1,5}", address):
        raise UserError(f"coordinator_address={address} is not HOST:PORT; write for example 10.0.0.2:8476.")
    if address is not None and not 0 < int(address.rpartition(":")[2]) <= 65535:
        raise UserError(f"coordinator_address={address} has a port that is not one of 1 to 65535; choose such as 8476.")
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


def check_output(job: Job) -> None:
    """Whether results can be written under their names; asked on process 0 alone, which may write to a disk of its own.

    Raises:
      UserError: they cannot, or `save_file` exists and may not be replaced.
    """
    cfg = job.cfg
    if cfg.save_file is None:
        folder = paths.parse(cfg.output_dir)
        _room(job, _writable(folder / cfg.run_name, "output_dir"), "output_dir")
        _one_file(job, folder)
        return
    path, frames = paths.parse(cfg.save_file), not job.suffix
    _one_file(job, path)
    count = 1 if cfg.decode_latents else len(job.videos)
    if count > 1:
        raise UserError(
            f"save_file names one file, but {count} videos are asked for; leave it out, "
            "and they are named below output_dir/run_name."
        )
    if path.name in ("", "..") or (not frames and (cfg.save_file.endswith("/") or path.is_dir())):
        raise UserError(f"save_file={cfg.save_file} is a folder; name a file, such as {path / 'video'}{job.suffix}.")
    suffix = path.suffix.lower().lstrip(".")
    suffix = schema.KEYS["output_format"].values.get(suffix, suffix)
    if suffix in _FILE_FORMATS if frames else suffix != cfg.output_format:
        raise UserError(
            f"save_file={cfg.save_file} does not have the extension of output_format={cfg.output_format}; "
            f"name it {path.with_suffix('' if frames else '.' + cfg.output_format)}."
        )
    _room(job, _writable(path.parent, "save_file"), "save_file")
    stem = path.name if frames else path.stem
    longest = path.with_name(f"{stem}.latents.safetensors")
    try:
        with contextlib.suppress(FileNotFoundError):
            longest.stat()
    except OSError as error:
        raise UserError(
            f"save_file={cfg.save_file}: the name of a file beside it, {longest.name:.40}..., is refused "
            f"({error.strerror}); write a shorter one."
        ) from None
    for other in (path, path.with_name(f"{stem}.json")):  # latents may be this run's own: `Outputs` knows
        if other.exists() and not cfg.overwrite:
            raise UserError(f"{other} exists already; name another save_file, or write overwrite=true.")


def _one_file(job: Job, path: paths.AnyPath) -> None:
    if not job.suffix and not isinstance(path, Path):
        raise UserError(
            f"output_format=png of several frames is a folder, which {path} cannot take as a whole; "
            "choose webp, npy or mp4."
        )


def _room(job: Job, folder: paths.AnyPath, key: str) -> None:
    """Checks that the latents of the largest video fit on the disk of `folder`: the work of a run is in them."""
    if not isinstance(folder, Path) or job.cfg.decode_latents:
        return
    channels = (job.spec.network or {}).get("out_channels", 16)
    tokens = max(math.prod(job.latent_grid(video)) for video in job.videos) * len(job.segments)
    needed, free = 4 * channels * tokens, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{key}: {free / 1e6:.1f} MB are free on the disk of {folder}, and the latents of a video take "
            f"{needed / 1e6:.1f} MB; free some space or choose another folder."
        )


def _is_there(path: Path) -> bool:
    """Whether something has that name, be it a link that leads nowhere; raises OSError where nothing can have it."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _writable(folder: paths.AnyPath, key: str) -> paths.AnyPath:
    """Checks, by a temporary file, that `folder` can be written; it need not exist yet. Returns what exists of it."""
    if not isinstance(folder, Path):
        try:
            paths.check_writable(folder)
        except OSError as error:
            raise UserError(f"{key}: {folder} cannot be written ({error.strerror or error}); choose another.") from None
        return folder
    existing = folder.absolute()
    try:
        while not _is_there(existing):
            existing = existing.parent
        paths.check_writable(existing)
    except OSError as error:
        raise UserError(
            f"{key}: the folder {folder} cannot be written ({existing}: {error.strerror}); choose another."
        ) from None
    return existing
