"""The one schema: every key with its type, bounds, default and help."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PrivateAttr

from maxdiffusion.attention.plan import names

# Names of the official repository that stand for more than one key; those of one key are on its line below.
COMPOUND_ALIASES: Mapping[str, str] = {
    "size": "width and height, as 1280*720 or 1280x720; by an image an area in its proportions; auto: the variant's",
    "sample_guide_scale": "guidance_scale, or in a list [guidance_scale_2, guidance_scale]",
    "ring_size": "ici_context_parallelism = ring_size x ulysses_shards",
    "src_ref_images": "reference_images, separated by commas",
    "replace_flag": "mode=replace (Animate)",
    "src_root_path": "image, pose_video, face_video, and with mode=replace background_video and mask_video; they are "
    "src_ref.png, src_pose.mp4, src_face.mp4, src_bg.mp4 and src_mask.mp4 of that folder",
}


def _as_tuple(value: Any) -> Any:
    """Turns one value into a list of one."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _empty_is_no_tuple(value: Any) -> Any:
    return () if value == "" else _as_tuple(value)


def _strengths(value: Any) -> Any:
    """Turns one file or a list of them into a mapping to strength 1."""
    if isinstance(value, Mapping):
        if any(isinstance(strength, list) for strength in value.values()):
            raise ValueError(
                "should give each file one strength, as a LoRA is merged into the weights before the first clip; make "
                "clips of another strength by a run with extend=VIDEO"
            )
        return value
    files = _empty_is_no_tuple(value)
    if twice := {file for file in files if files.count(file) > 1}:
        raise ValueError(f"should name each file once, not {twice.pop()} twice")
    return dict.fromkeys(files, 1.0)


def _empty_is_none(value: Any) -> Any:
    return None if value == "" else value


def _degree(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("should be a positive integer, or -1 to fill")
    return value


def _rate(value: Any) -> Any:
    """Frames per second: 16, 24000/1001, or a decimal; 23.98, 29.97 and the like are N*1000/1001."""
    try:
        text = str(value).strip()
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError("should be a number of frames per second, such as 16, 29.97 or 30000/1001") from None
    digits = len(text.partition(".")[2])
    ntsc = [Fraction(base * 1000, 1001) for base in (24, 30, 48, 60, 120)]
    rate = next((exact for exact in ntsc if digits >= 2 and round(exact, digits) == rate), rate)
    if rate.denominator > 65535:  # an mp4 could not keep it
        raise ValueError("should have at most four decimals, or be a fraction such as 30000/1001")
    return rate


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _one_folder(value: str) -> str:
    if value in ("", ".", "..") or set("/\\\0") & set(value):
        raise ValueError("should be the name of one folder, without slashes")
    return value


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Images = Annotated[tuple[str, ...], BeforeValidator(_empty_is_no_tuple)]
ClipPrompts = Annotated[tuple[str, ...], BeforeValidator(_empty_is_no_tuple)]
Strengths = Annotated[dict[str, float], BeforeValidator(_strengths)]
Numbers = Annotated[tuple[Annotated[float, Field(ge=0, le=100)], ...], BeforeValidator(_as_tuple)]
Levels = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], BeforeValidator(_empty_is_no_tuple)]
Seed = Annotated[int, Field(ge=-1, le=2**32 - 1)]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(_as_tuple)]
ClipSeeds = Annotated[tuple[Annotated[int, Field(ge=0, le=2**32 - 1)], ...], BeforeValidator(_empty_is_no_tuple)]
Degree = Annotated[int, AfterValidator(_degree)]
FolderName = Annotated[str, AfterValidator(_one_folder)]
Rate = Annotated[
    Fraction,
    BeforeValidator(_rate),
    PlainSerializer(lambda rate: rate.numerator if rate.denominator == 1 else str(rate), when_used="json"),
]
OptionalStr = Annotated[str | None, BeforeValidator(_empty_is_none)]
HomePath = Annotated[str, AfterValidator(os.path.expanduser), Field(validate_default=True)]
Dtype = Literal["float32", "bfloat16"]
if TYPE_CHECKING:
    AttentionName = str
else:
    AttentionName = Literal["auto", *names()]
Format = Literal["mp4", "gif", "webp", "png", "jpg", "npy"]
BlockSizes = Annotated[
    dict[Literal["block_q", "block_kv", "block_kv_compute"], int],
    BeforeValidator(lambda value: {} if value == "" else value),
]
OptionalBool = Annotated[bool | None, BeforeValidator(_empty_is_none)]
OptionalInt = Annotated[int | None, BeforeValidator(_empty_is_none)]
AxisRules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

PARALLELISM = "attention and parallelism"
MAX_FRAMES = 4093
VARIANT: Any = object()  # the default is the variant's own, or follows from other keys when a run is resolved

# Groups whose keys decide, by default, the pixels of the video and the programs that a run compiles.
_DECIDE_THE_VIDEO = {"model", "video", "control", "clips", "sampling", "dtypes"}
_DECIDE_THE_PROGRAMS = {*_DECIDE_THE_VIDEO, PARALLELISM, "runtime"}


@dataclasses.dataclass(frozen=True)
class Key:
    """Metadata of a key besides type, default, bounds and help.

    Attributes:
      group: the heading in --help.
      path: `input` or `output`: ~ and $VARIABLES are expanded; that of an input in a YAML file may be relative to it.
      is_video: names a video file or a folder of frames.
      from_variant: the variant's row has a default of this name.
      needs: the key that must be set with this one, as key=value.
      per_host: may differ between the processes of one run.
      of_the_video: decides the pixels.
      of_the_program: decides what is compiled.
      alias: its name in the official repository.
      values: the official repository's names of values.
    """

    group: str
    path: Literal["", "input", "output"] = ""
    is_video: bool = False
    from_variant: bool = False
    needs: str = ""
    per_host: bool = False
    of_the_video: bool = False
    of_the_program: bool = False
    alias: str = ""
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)


_METADATA = {field.name for field in dataclasses.fields(Key)}


def _key(group: str, default: Any, **more: Any) -> Any:
    """A field of `Config`, whose docstring is its help: `more` are attributes of its `Key` and pydantic's bounds."""
    about = {name: more.pop(name) for name in _METADATA & more.keys()}
    about.setdefault("per_host", "path" in about)  # contents are compared instead
    about.setdefault("of_the_video", group in _DECIDE_THE_VIDEO)
    about.setdefault("of_the_program", group in _DECIDE_THE_PROGRAMS)
    extra: dict[str, Any] = {"key": Key(group, **about)}
    return Field(*(() if default is VARIANT else (default,)), json_schema_extra=extra, **more)


class Config(BaseModel):
    """The keys of one run: typed, frozen, complete. `maxdiffusion.request.load` makes it.

    `origins` says where each value that is not the schema's default came from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    _origins: Mapping[str, str] = PrivateAttr(default_factory=dict)
    _unused: Mapping[str, str] = PrivateAttr(default_factory=dict)

    # ---- model
    pretrained_model_name_or_path: str = _key("model", VARIANT, path="input", alias="ckpt_dir", min_length=1)
    """Checkpoint in the diffusers layout: a folder, or a hub id such as Wan-AI/Wan2.1-T2V-14B-Diffusers; in a YAML
    file a path that starts with ./ or ../ is relative to that file."""
    revision: OptionalStr = _key("model", None)
    """Branch, tag or commit of the hub id."""
    transformer_file: OptionalStr = _key("model", None, path="input")
    """The transformer's weights in place of the checkpoint's: a .safetensors file (names of diffusers or original;
    bf16, fp16, fp32, fp8 with or without scales, int8 with scales; alone or in a file of the whole pipeline), a .gguf
    file, an index of shards, or the folder that holds it."""
    transformer_2_file: OptionalStr = _key("model", None, path="input")
    """The same for the low-noise expert, where there are two."""
    text_encoder_file: OptionalStr = _key("model", None, path="input")
    """The same for the text encoder."""
    image_encoder_file: OptionalStr = _key("model", None, path="input")
    """The same for the image encoder, where there is one."""
    audio_encoder_file: OptionalStr = _key("model", None, path="input")
    """The same for the audio encoder of S2V."""
    vae_file: OptionalStr = _key("model", None, path="input")
    """The same for the VAE."""
    lora: Strengths = _key("model", {}, path="input", of_the_program=False)
    """LoRA merged into the transformer (of two experts, the high-noise one): a .safetensors file, its URL or
    owner/repo/FILE on the hub; a list of them, or a mapping to strengths, {one.safetensors: 0.8, b.safetensors: 1}."""
    lora_2: Strengths = _key("model", {}, path="input", of_the_program=False)
    """The same for the low-noise expert, where there are two."""
    inspect: bool = _key("model", False, of_the_video=False, of_the_program=False)
    """Make no video: print what the checkpoint is and whether it would load, from its headers alone."""
    model_name: str = _key("model", "wan2.1")
    """A variant, or a family of which the checkpoint's own dimensions choose the variant."""
    model_type: Annotated[
        Literal["T2V", "I2V", "FLF2V", "TI2V", "VACE", "ANIMATE", "ANIMATE2", "S2V"],
        BeforeValidator(_upper),
    ] = _key("model", VARIANT, from_variant=True)
    """The task, one that the variant can do: T2V is text to video."""

    conventions: Literal["official", "diffusers"] = _key("model", "official")
    """Whose noise levels, resizing, sizes and reference order apply where the official code and diffusers differ;
    docs/conventions.md lists them."""

    # ---- prompt
    prompt: Texts = _key("prompt", (), from_variant=True)
    """What to show; a list makes several videos: in brackets, with commas or quotes ([close-up] alone is text). Animate
    has the official default text."""
    prompts: OptionalStr = _key("prompt", None, path="input")
    """File of one JSON object per line, each a video: prompt, negative_prompt, seed, image, last_image, size or width
    and height, output (its name), lora and lora_2 (alike in all); what is done is skipped when the same command runs
    again."""
    negative_prompt: Texts = _key("prompt", VARIANT, from_variant=True)
    """What to avoid; one for all prompts or one for each."""
    seed: Seeds = _key("prompt", 0, alias="base_seed", validate_default=True)
    """Determines the noise; -1 draws one, which log and record tell; a list makes several videos."""
    image: Images = _key("prompt", (), path="input", alias="first_frame")
    """Path or URL of the first frame (I2V, FLF2V, TI2V), the character (Animate) or the speaker (S2V); one for all or
    one for each."""
    last_image: Images = _key("prompt", (), path="input", alias="last_frame")
    """Path or URL of the last frame (FLF2V; I2V optionally)."""

    # ---- video
    height: int = _key("video", VARIANT, from_variant=True, ge=16, le=8192)
    """Pixels, a multiple of 16."""
    width: int = _key("video", VARIANT, from_variant=True, ge=16, le=8192)
    """Pixels, a multiple of 16."""
    num_frames: int = _key("video", VARIANT, from_variant=True, alias="frame_num", ge=1, le=MAX_FRAMES)
    """Frames, 4n+1; of Animate and S2V any number, by default as many as the pose or the driving video has or the
    sound lasts."""
    fps: Rate = _key("video", VARIANT, from_variant=True, ge=1, le=240)
    """Frames per second of the written video, such as 16, 29.97 or 30000/1001; input videos are shown at that rate."""

    # ---- control
    video: OptionalStr = _key("control", None, path="input", is_video=True, alias="src_video")
    """Video file or folder of frames: the control of VACE, or T2V's input, changed by `strength`."""
    strength: float = _key("control", 0.8, needs="video=FILE", gt=0, le=1)
    """Part of the noise levels over which `video` is changed (T2V)."""
    mask: OptionalStr = _key("control", None, needs="video=FILE", path="input", is_video=True, alias="src_mask")
    """Mask of each frame, white where to generate anew (VACE)."""
    reference_images: Images = _key("control", (), path="input")
    """Images of subjects to show (VACE)."""
    conditioning_scale: Numbers = _key("control", 1.0, validate_default=True)
    """Scale of VACE's hints; a list has one for each of its layers."""
    audio: OptionalStr = _key("control", None, path="input")
    """Path or URL of the sound to speak or sing, of any file with sound, a video too (S2V); the result has it."""
    pose_video: OptionalStr = _key("control", None, path="input", is_video=True)
    """The pose of each frame, drawn (Animate; S2V optionally, from its beginning)."""
    driving_video: OptionalStr = _key("control", None, path="input", is_video=True)
    """The actor whose motion the character takes over (Animate 2)."""
    face_video: OptionalStr = _key("control", None, path="input", is_video=True)
    """The actor's face in each frame, cut out (Animate)."""
    mode: Literal["animate", "replace"] = _key("control", "animate")
    """The character acts before its own background, or takes the actor's place (Animate)."""
    background_video: OptionalStr = _key("control", None, needs="mode=replace", path="input", is_video=True)
    """The scene without the actor (Animate)."""
    mask_video: OptionalStr = _key("control", None, needs="mode=replace", path="input", is_video=True)
    """White where the character stands (Animate)."""
    input_frames: Literal["timed", "every", "spread"] = _key("control", "timed", of_the_program=False)
    """Frames taken of input videos: those shown at the times of the result's, the first stored ones, or stored ones
    spread over the whole video (the default of VACE by the official conventions)."""
    segment_frame_length: int = _key("control", 77, from_variant=True, alias="infer_frames", ge=1, le=4093)
    """Frames per segment: 4n+1 (Animate), or 4n, 80 by default (S2V)."""
    prev_segment_conditioning_frames: int = _key("control", 1, alias="refert_num", ge=1, le=4093)
    """Last frames of a segment that the next one starts from, 1 or 5 (Animate)."""

    # ---- clips
    clips: int = _key("clips", 1, ge=1, le=1000)
    """Clips of num_frames in one video, each but the first from the last frames of the one before (I2V, FLF2V, TI2V,
    VACE); see docs/long_videos.md."""
    extend: OptionalStr = _key("clips", None, path="input", is_video=True)
    """Video file, folder of frames or URL whose last frames the first clip starts from; it begins the result."""
    overlap_frames: int = _key("clips", 1, ge=1, le=MAX_FRAMES)
    """Last frames of a clip (or of extend) that the next one starts from, 4n+1; the result has them once."""
    clip_prompts: ClipPrompts = _key("clips", ())
    """A prompt for each clip; prompt then only names the files."""
    clip_seeds: ClipSeeds = _key("clips", ())
    """A seed for each clip; by default seed, seed + 1, seed + 2, ..."""
    clip_padding: Literal["zeros", "reference"] = _key("clips", "zeros")
    """What the encoded frames of I2V show where none is given: nothing, or the image again, as LoRAs of SVI learnt."""
    clip_mask: Literal["overlap", "first"] = _key("clips", "overlap")
    """Frames that I2V's mask marks as given: all that overlap, or the first, as LoRAs of SVI learnt."""
    redo_clip: OptionalInt = _key("clips", None, of_the_video=False, of_the_program=False, ge=2, le=1000)
    """Make this clip and those after it anew, after the kept latents of the clips before it."""

    # ---- sampling
    num_inference_steps: int = _key("sampling", VARIANT, from_variant=True, alias="sample_steps", ge=1, le=1000)
    """Denoise steps."""
    num_inference_steps_2: int | None = _key("sampling", None, ge=1, le=1000)
    """Steps of the low-noise expert alone, where there are two: num_inference_steps are then those of the high-noise
    expert, from level 1 down to boundary_ratio, and these go on from there to 0."""
    sigmas: Levels = _key("sampling", ())
    """The noise levels themselves, falling, in place of steps and shift: [1, 0.757, 0.522]; 0 is added at the end."""
    guidance_scale: float = _key("sampling", VARIANT, from_variant=True, ge=1, le=100)
    """Scale of classifier-free guidance; 1 is none and saves half the time."""
    guidance_scale_2: float | None = _key("sampling", None, from_variant=True, ge=1, le=100)
    """The same for the low-noise expert, where there are two; by default guidance_scale if that is given."""
    boundary_ratio: float | None = _key("sampling", None, from_variant=True, ge=0, le=1)
    """The high-noise expert denoises timesteps of at least 1000 times this."""
    boundary_step: int | None = _key("sampling", None, ge=0, le=1000)
    """Number of first steps that the high-noise expert takes, in place of boundary_ratio."""
    expert_residency: Literal["together", "in_turn"] = _key("sampling", "together", of_the_video=False)
    """Both experts side by side, or one after the other in the memory of one: the high-noise steps of eight batches,
    then their low-noise steps, then the next eight."""
    flow_shift: float = _key("sampling", VARIANT, from_variant=True, alias="sample_shift", gt=0, le=100)
    """Shift of the noise levels towards more noise."""
    flow_shift_2: float | None = _key("sampling", None, needs="num_inference_steps_2=4", gt=0, le=100)
    """The same for the low-noise expert's own steps; by default flow_shift."""
    solver: Literal["unipc", "euler", "dpmpp_2m", "renoise"] = _key(
        "sampling", "unipc", alias="sample_solver", values={"dpm++": "dpmpp_2m"}
    )
    """Sampler; renoise predicts the video and adds fresh noise up to the next level, for models distilled so."""
    guidance_mode: Literal["auto", "batched", "two_pass"] = _key("sampling", "auto", of_the_video=False)
    """Both branches of guidance in one batch, or one after the other in less memory."""
    loop: Literal["steps", "scan"] = _key("sampling", "steps", of_the_video=False)
    """One call per step with progress, or one compiled scan of several."""
    context_window: OptionalInt = _key("sampling", None, ge=1, le=MAX_FRAMES)
    """Frames of a window, 4n+1 such as 81: each step is computed over windows of a video longer than what the model was
    trained on, and blended (T2V, VACE, TI2V without an image); empty: the whole video at once."""
    context_overlap: int = _key("sampling", 16, needs="context_window=81", ge=0, le=MAX_FRAMES)
    """Frames that neighbouring windows share, 4n and fewer than a window has."""
    low_resolution_steps: Annotated[int, Field(ge=1, le=1000)] | Literal["auto"] | None = _key("sampling", None)
    """First steps that are made at half height and width, a quarter of the tokens, which changes the video (T2V): a
    number, or auto for those in which the noise hides what is missing; see docs/caches.md."""
    cache: Literal["none", "mag", "sea", "first_block", "taylor", "spectrum"] = _key("sampling", "none")
    """Leave calls of the network out where it repeats itself, which changes the video: MagCache, SeaCache, FirstBlock,
    TaylorSeer or Spectrum; see docs/caches.md. compare shows what is lost."""
    cache_threshold: float | None = _key("sampling", None, needs="cache=sea", ge=0, le=100)
    """How much may change before a step is computed (mag, sea, first_block); more is faster and less exact."""
    cache_psnr: float | None = _key("sampling", None, needs="cache=sea", gt=0, le=100)
    """PSNR in dB of the frames: the largest cache_threshold that keeps it over the first steps is found before the run
    (mag, sea, first_block)."""
    cache_max_skips: int | None = _key("sampling", None, needs="cache=sea", ge=0, le=100)
    """The most steps in a row that are left out (mag, sea, taylor, spectrum)."""
    cache_first_steps: int | None = _key("sampling", None, needs="cache=sea", ge=1, le=1000)
    """First steps of each expert that are computed."""
    cache_ratios: OptionalStr = _key("sampling", None, needs="cache=mag", path="input", of_the_program=False)
    """JSON file of MagCache's ratios that calibrate_cache wrote, in place of the published ones."""
    calibrate_cache: OptionalStr = _key("sampling", None, path="output", per_host=True, of_the_video=False)
    """JSON file to write: the run computes every step and measures MagCache's ratios for its model and schedule."""
    checkpoint_steps: OptionalInt = _key("sampling", None, of_the_video=False, ge=0, le=1000)
    """Steps between two saved states of a run, from which the same command goes on; 0: none; by default so many as
    take a minute. With loop=scan also the steps of one call, 10 by default."""
    initial_latents: OptionalStr = _key("sampling", None, path="input")
    """Safetensors file with the noise to start from (b c f h w)."""
    decode_latents: OptionalStr = _key("sampling", None, path="input")
    """Safetensors file of latents: only decode and write them."""

    # ---- attention and parallelism
    attention: AttentionName = _key(PARALLELISM, "auto")
    """How self-attention is computed and split over the context axis; tokamax_* need the package's `tpu` extra."""
    ulysses_shards: Annotated[Degree, BeforeValidator(lambda value: -1 if value == "auto" else value)] = _key(
        PARALLELISM, -1, alias="ulysses_size"
    )
    """Devices of the context axis that trade sequence for heads; -1 or auto: chosen by cost, with attention=auto or
    ulysses_ring."""
    ulysses_attention_chunks: int = _key(PARALLELISM, 1, ge=1, le=1024)
    """Head groups: the all-to-all of one overlaps the attention of another."""
    ring_direction: Literal["one_way", "two_way"] = _key(PARALLELISM, "one_way")
    """Whether keys rotate around the ring in one direction or by halves in both."""
    flash_block_sizes: BlockSizes = _key(PARALLELISM, {})
    """Rows of a TPU kernel's blocks: {block_q: N, block_kv: N, block_kv_compute: N}, none or some; the rest are chosen
    by device kind and length."""
    use_base2_exp: OptionalBool = _key(PARALLELISM, None)
    """Exponentials to base 2 inside a kernel that offers it."""
    use_experimental_scheduler: OptionalBool = _key(PARALLELISM, None)
    """The alternative schedule of a kernel that offers one."""
    attention_vmem_limit_kib: OptionalInt = _key(PARALLELISM, None)
    """KiB of vector memory that this package's TPU kernel may use."""
    ici_data_parallelism: Degree | Literal["auto"] = _key(PARALLELISM, "auto")
    """Devices over the batch; -1: all that are left; auto: 2 for the guidance pair where ulysses_shards is chosen too
    and that is faster, else 1."""
    ici_fsdp_parallelism: Degree = _key(PARALLELISM, 1)
    """Devices over which weights are sharded."""
    ici_context_parallelism: Degree = _key(PARALLELISM, -1)
    """Devices over the video tokens."""
    ici_tensor_parallelism: Degree = _key(PARALLELISM, 1)
    """Devices over heads and feed-forward width."""
    dcn_data_parallelism: Degree = _key(PARALLELISM, -1)
    """The same four, over slices."""
    dcn_fsdp_parallelism: Degree = _key(PARALLELISM, 1)
    """Slices over which weights are sharded."""
    dcn_context_parallelism: Degree = _key(PARALLELISM, 1)
    """Slices over the video tokens."""
    dcn_tensor_parallelism: Degree = _key(PARALLELISM, 1)
    """Slices over heads and feed-forward width."""
    logical_axis_rules: AxisRules = _key(PARALLELISM, ())
    """[[logical axis, mesh axis], ...] that override the built-in table."""
    per_device_batch_size: int = _key(PARALLELISM, 1, ge=1, le=1024)
    """Videos made at once per device of the data axis; more run in turn."""

    # ---- verify
    verify: bool = _key("verify", False)
    """Make no video: compare a few steps on this mesh with those on another."""
    verify_steps: int = _key("verify", 4, needs="verify=true", ge=1, le=1000)
    """Denoise steps that are compared."""
    verify_against: Texts = _key("verify", (), needs="verify=true")
    """The other mesh as key=value arguments, [attention=ring, ulysses_shards=1]; empty: one device."""
    verify_psnr: float | None = _key("verify", None, needs="verify=true")
    """Required PSNR in dB; by default 60 in float32, 30 in bfloat16."""

    # ---- compare
    compare: ClipPrompts = _key("compare", ())
    """Make the first video exactly and once more with each of these keys, from the same noise, and show what is lost:
    [cache=sea, cache=mag cache_threshold=0.2]; keys of one variant are separated by blanks."""

    # ---- plan
    plan: OptionalStr = _key("plan", None)
    """Make no video: print what fits, what is fastest and why, by compiling for a TPU slice that need not be here:
    v6e-8, v6e:4x4, auto (the slice of this TPU VM), or here (this machine's own devices)."""
    plan_file: Texts = _key("plan", (), needs="plan=v6e-8", path="output")
    """File for the plan: .json, or .svg for a picture; a list makes both."""
    plan_minutes: float = _key("plan", 12.0, needs="plan=v6e-8", gt=0, le=10000)
    """Limit of compiling, in minutes; splits left over are shown with modelled figures."""
    price_per_chip_hour: float | None = _key("plan", None, needs="plan=v6e-8", gt=0)
    """Price of a chip-hour, in any currency."""

    # ---- dtypes
    weights_dtype: Dtype = _key("dtypes", "bfloat16")
    """The transformer's parameters."""
    activations_dtype: Dtype = _key("dtypes", "bfloat16")
    """The transformer's activations; float32 is faster on CPUs."""
    text_encoder_dtype: Dtype = _key("dtypes", "bfloat16")
    """The text and image encoders' parameters and activations."""
    vae_dtype: Dtype = _key("dtypes", "float32")
    """Dtype of the VAE's parameters and activations; on a TPU convolutions multiply in bfloat16 either way."""

    quantization: Literal["none", "int8", "fp8", "auto"] = _key("dtypes", "none")
    """Weights and activations of the linear layers in the transformer's blocks, which are most of it, in 8 bits (fp8 is
    e4m3); auto: the product that this kind of device gains from, or int8 weights alone; see docs/quantization.md."""
    attention_quantization: Literal["none", "fp8"] = _key("dtypes", "none")
    """fp8: queries and keys of the self-attention in e4m3. TPU7x gains from it; see docs/quantization.md."""

    # ---- output
    output_dir: str = _key("output", "outputs", path="output", min_length=1)
    """Folder for results, relative to the current one."""
    run_name: FolderName = _key("output", VARIANT)
    """Folder below output_dir; by default the variant's name."""
    save_file: OptionalStr = _key("output", None, path="output")
    """The result's exact path, instead of output_dir/run_name/..."""
    output_format: Format = _key("output", "mp4", of_the_video=True, values={"jpeg": "jpg"})
    """Save_file's extension if it has one; of one frame png, jpg and webp are a picture, of several png is a folder of
    frames; npy is uint8 f h w c."""
    keep_audio: bool = _key("output", False, of_the_video=True)
    """Keep the sound of the input video that the result shows at the same time: of extend, or of the first that has any
    of video, pose_video, face_video and background_video; mp4 only."""
    overwrite: bool = _key("output", False)
    """Whether save_file may replace an existing file."""
    save_prompt_in_metadata: bool = _key("output", True)
    """Whether the video's metadata and name hold the prompt."""
    contact_sheet: int = _key("output", 6, ge=0, le=100)
    """Frames of the contact sheet NAME.sheet.jpg, a row of small pictures beside each video; 0: none."""
    gallery: bool = _key("output", False)
    """Write index.html beside the videos, a page that shows them all without a network; true by default for prompts."""

    # ---- hosts
    jax_distributed: Literal["auto", "on", "off"] = _key("hosts", "auto", per_host=True)
    """One process per host as one run; auto: where the three keys below or a launcher say so."""
    coordinator_address: OptionalStr = _key("hosts", None, per_host=True)
    """HOST:PORT of process 0; also JAX_COORDINATOR_ADDRESS."""
    num_processes: int | None = _key("hosts", None, ge=1)
    """Number of processes; also JAX_NUM_PROCESSES."""
    process_id: int | None = _key("hosts", None, per_host=True, ge=0)
    """Index of this process, from 0; also JAX_PROCESS_ID."""
    initialization_timeout: int = _key("hosts", 300, per_host=True, ge=1, le=86400)
    """Seconds to wait for the other processes."""

    # ---- runtime
    scan_layers: bool = _key("runtime", True)
    """Compile one block and scan over it; false compiles every block."""
    jax_cache_dir: HomePath = _key("runtime", "~/.cache/maxdiffusion/xla", path="output", of_the_program=False)
    """Folder of compiled programs, kept between runs, with plans and text embeddings beside it; empty: none."""
    progress: Literal["auto", "on", "off"] = _key("runtime", "auto", per_host=True, of_the_program=False)
    """Progress bars; auto: where output is a terminal, elsewhere lines of the log."""
    log_level: Literal["debug", "info", "warning", "error"] = _key(
        "runtime", "info", per_host=True, of_the_program=False
    )
    """How much is logged."""

    @property
    def origins(self) -> Mapping[str, str]:
        """Key -> where its value came from, for every value that is not the schema's default."""
        return self._origins

    def describe(self) -> str:
        """Text of the log: the video's size, then conventions and each non-default value with their origins.

        Official flags that no key takes are the last lines, with what serves instead.
        """
        origins = {"conventions": "default", **self._origins}
        clips = f"{self.clips} clips of " if self.clips > 1 else ""
        lines = [
            f"video: {self.width} wide x {self.height} high, {clips}{self.num_frames} frames at {self.fps} per second",
            *(f"{key}: {_shown(getattr(self, key))}  ({origin})" for key, origin in origins.items()),
            *(f"{flag}: not used; {instead}" for flag, instead in self._unused.items()),
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Every key as JSON types, for the file beside the result; a YAML file of it loads to an equal Config."""
        return self.model_dump(mode="json")


KEYS: Mapping[str, Key] = {
    name: info.json_schema_extra["key"]  # type: ignore[index, misc]
    for name, info in Config.model_fields.items()
}
ALIASES: Mapping[str, str] = {key.alias: name for name, key in KEYS.items() if key.alias}


def default(name: str) -> Any:
    """The schema's own default of a key; undefined for those that the variant gives."""
    return Config.model_fields[name].default


def is_default(cfg: Config, name: str) -> bool:
    """Whether a key has the schema's default, of which a list of one is another spelling."""
    return getattr(cfg, name) in (default(name), (default(name),))


def takes_list(name: str) -> bool:
    """Whether a value in brackets is a list of this key's; a mapping of paths may be a list of them."""
    return get_origin(Config.model_fields[name].annotation) is tuple or (takes_mapping(name) and bool(KEYS[name].path))


def takes_mapping(name: str) -> bool:
    """Whether a value in braces is a mapping of this key's."""
    return get_origin(Config.model_fields[name].annotation) is dict


def is_bool(name: str) -> bool:
    """Whether the key of that name is true or false."""
    return name in KEYS and Config.model_fields[name].annotation is bool


def choices(name: str) -> list[str]:
    """The values among which a key is chosen; of a number or `auto`, `auto`; none where any text or number is legal."""
    return list(dict.fromkeys(_choices(Config.model_fields[name].annotation)))


def _choices(annotation: Any) -> Iterator[str]:
    if annotation is bool:
        yield from ("true", "false")
    elif get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif get_origin(annotation) not in (dict, tuple):
        for each in get_args(annotation):
            yield from _choices(each)


def type_name(name: str) -> str:
    """The type of a key in words: `integer | auto`, `path`, `list of numbers`, `mapping of paths to numbers`."""
    of = {**_TYPES, str: "path"} if KEYS[name].path else _TYPES
    kinds = [of[kind] for kind in _leaves(Config.model_fields[name].annotation) if kind in of]
    if takes_mapping(name):
        return f"mapping of {kinds[0] if len(kinds) > 1 else 'name'}s to {kinds[-1]}s"
    if takes_list(name):
        return f"list of {kinds[0]}s" if len(kinds) == 1 else "list of pairs"
    return " | ".join([*kinds, *choices(name)])


_TYPES: Mapping[Any, str] = {int: "integer", float: "number", str: "text", Fraction: "number"}


def _leaves(annotation: Any) -> Iterator[Any]:
    """The plain types of an annotation."""
    if get_origin(annotation) in (None, Literal):
        yield annotation
    for each in get_args(annotation) if get_origin(annotation) is not Literal else ():
        yield from _leaves(each)


def group(name: str) -> list[str]:
    """The keys of one group."""
    return [key for key, about in KEYS.items() if about.group == name]


def videos() -> list[str]:
    """The keys of input videos."""
    return [key for key, about in KEYS.items() if about.is_video]


def rows() -> Iterator[tuple[str, str, str, str]]:
    """(key, group, default as text, help with bounds and alias) of every key, in the order of the schema."""
    for name, info in Config.model_fields.items():
        shown = "" if info.is_required() else _shown(info.default)
        text = " ".join((info.description or "").split()).removesuffix(".")
        bounds = [
            f"{'above ' if side == 'gt' else ''}{getattr(constraint, side)}"
            for side in ("gt", "ge", "le")
            for constraint in info.metadata
            if getattr(constraint, side, None) is not None
        ]
        text += f", {' to '.join(bounds)}" if len(bounds) == 2 else ""
        choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
        if choices:
            text += f" [{' '.join(choices)}]"
        if KEYS[name].alias:
            text += f" (alias {KEYS[name].alias})"
        yield name, KEYS[name].group, shown, text


def _shown(value: Any) -> str:
    """A value as one would write it in YAML; a list of one as its element."""
    if isinstance(value, tuple):
        value = value[0] if len(value) == 1 and isinstance(value[0], str | int) else list(value)
    if value is None or value == [] or value == {}:
        return ""
    return str(value) if isinstance(value, str | Fraction) else json.dumps(value, ensure_ascii=False)
