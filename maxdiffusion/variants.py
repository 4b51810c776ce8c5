"""Every supported variant of WAN, as data: its identity, its checkpoint and its official defaults.

A new variant is a new row of `VARIANTS`. A run reads the dimensions of its networks from the checkpoint's own files;
those of the table identify checkpoints and stand in for an official one that has not been fetched.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.media import sizes

# The negative prompt of the official repositories (`sample_neg_prompt`). Only WAN 2.1 adds to it for image inputs: no
# shaking camera, and between two images no cut.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)

# speech to video: wan_s2v_14B.py of the official repository
S2V_NEGATIVE_PROMPT = (
    "画面模糊，最差质量，画面模糊，细节模糊不清，情绪激动剧烈，手快速抖动，字幕，丑陋的，残缺的，多余的手指，画得不好的手部，"
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

ANIMATE_PROMPT = (
    "视频中的人在做动作"  # "the person in the video is moving": wan_animate_14B.py of the official repository
)


@dataclasses.dataclass(frozen=True)
class Dims:
    """The dimensions that tell the transformers of one family apart (keys of transformer/config.json)."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int

    @classmethod
    def of(cls, transformer_config: Mapping[str, Any]) -> Dims:
        """Reads the dimensions.

        Raises:
          UserError: one of them is missing or not an integer.
        """
        values = {field.name: transformer_config.get(field.name) for field in dataclasses.fields(cls)}
        for name, value in values.items():
            if not isinstance(value, int):
                raise UserError(
                    f"The checkpoint's transformer/config.json gives {name} as {value!r}, which is not an integer; "
                    "it must be a WAN checkpoint in the diffusers layout."
                )
        return cls(**values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers of {self.num_attention_heads} heads x {self.attention_head_dim} "
            f"with {self.in_channels} input channels"
        )


@dataclasses.dataclass(frozen=True)
class Task:
    """A kind of model, as data that conditioning, checks, planning and the loader read.

    Attributes:
      name: the config's `model_type`.
      takes: the keys of images, videos and control that it uses.
      needs: the required ones among them.
      conditions: its kinds of conditioning beside the text (keys of `conditioning.KINDS`).
      shaped_by: the key whose image or video gives `size=auto` its proportions.
      official_size: the official rule for a size in the proportions of that image or video.
      size_is_area: whether size=W*H is an area beside it, by the official conventions.
      spread: whether the frames of its control video are spread over all of it, by the official conventions.
      as_long_as: the key of the video or the sound that `num_frames` follows by default.
      extra_channels: whether the network's input has, beside the noisy latents, those of given frames and their mask.
      letterboxed: whether its image is put on black, and the result cut to the image's proportions.
      two_images: whether the image tokens come from two images.
      segmented: whether a long video is made in segments.
      windowed: whether a step may be computed over windows of a long video, unless it starts from an image.
      chained: whether a clip can start from the last frames of another.
      dropped: first frames that are made and not shown; where there are any, each segment is decoded after the latents
        of what was before it, and has 4n frames.
      reference_frames: latent frames before the frames of each segment, beside those of `reference_images`.
      pipeline_classes: the `_class_name`s of model_index.json; that of the official checkpoint first.
      transformer_class: `_class_name` of transformer/config.json.
    """

    name: str
    takes: tuple[str, ...]
    needs: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    shaped_by: str = "video"
    official_size: sizes.Rule = sizes.rounded  # the official code has no video to video
    size_is_area: bool = False
    spread: bool = False
    as_long_as: str = ""
    extra_channels: bool = False
    letterboxed: bool = False
    two_images: bool = False
    segmented: bool = False
    windowed: bool = False
    chained: bool = False
    dropped: int = 0
    reference_frames: int = 0
    pipeline_classes: tuple[str, ...] = ("WanPipeline", "WanVideoToVideoPipeline")
    transformer_class: str = "WanTransformer3DModel"


T2V = Task("T2V", takes=("video", "input_frames", "strength"), conditions=("video_to_video",), windowed=True)
I2V = Task(
    "I2V",
    takes=("image", "last_image"),
    needs=("image",),
    conditions=("image_tokens", "image_channels"),
    shaped_by="image",
    official_size=sizes.floored,
    size_is_area=True,
    extra_channels=True,
    chained=True,
    pipeline_classes=("WanImageToVideoPipeline",),
)
I2V_WITHOUT_CLIP = dataclasses.replace(I2V, conditions=("image_channels",))
FLF2V = dataclasses.replace(I2V, name="FLF2V", needs=("image", "last_image"), two_images=True)
TI2V = Task(
    "TI2V",
    takes=("image",),
    conditions=("first_frame",),
    shaped_by="image",
    official_size=sizes.nearest,
    size_is_area=True,
    windowed=True,
    chained=True,
    pipeline_classes=("WanPipeline", "WanImageToVideoPipeline"),
)
VACE = Task(
    "VACE",
    takes=("video", "mask", "input_frames", "reference_images", "conditioning_scale"),
    conditions=("vace",),
    official_size=sizes.within,
    size_is_area=True,
    spread=True,
    windowed=True,
    chained=True,
    pipeline_classes=("WanVACEPipeline",),
    transformer_class="WanVACETransformer3DModel",
)
ANIMATE = Task(
    "ANIMATE",
    takes=(
        "image",
        "pose_video",
        "face_video",
        "mode",
        "background_video",
        "mask_video",
        "input_frames",
        "segment_frame_length",
        "prev_segment_conditioning_frames",
    ),
    needs=("image", "pose_video", "face_video"),
    conditions=("character_tokens", "animate"),
    shaped_by="pose_video",
    official_size=sizes.own,
    as_long_as="pose_video",
    extra_channels=True,
    segmented=True,
    reference_frames=1,
    pipeline_classes=("WanAnimatePipeline",),
    transformer_class="WanAnimateTransformer3DModel",
)
ANIMATE2 = Task(
    "ANIMATE2",
    takes=("image", "driving_video", "input_frames", "segment_frame_length", "prev_segment_conditioning_frames"),
    needs=("image", "driving_video"),
    conditions=("animate2_tokens", "animate2"),
    shaped_by="image",
    official_size=sizes.floored_twice,
    size_is_area=True,
    as_long_as="driving_video",
    extra_channels=True,
    letterboxed=True,
    segmented=True,
    reference_frames=1,
    pipeline_classes=("WanAnimate2ModularPipeline",),
    transformer_class="WanAnimate2Transformer3DModel",
)
S2V = Task(
    "S2V",
    takes=("image", "audio", "pose_video", "input_frames", "segment_frame_length"),
    needs=("image", "audio"),
    conditions=("s2v",),
    shaped_by="image",
    official_size=sizes.covered,
    size_is_area=True,
    as_long_as="audio",
    segmented=True,
    dropped=3,
    pipeline_classes=("WanSpeechToVideoPipeline", "WanPipeline"),
    transformer_class="WanS2VTransformer3DModel",
)


# `_class_name` of checkpoints whose networks are those of a variant and whose recipe has few steps; see
# `request.few_step`.
FEW_STEP_PIPELINES = ("WanDMDPipeline",)


@dataclasses.dataclass(frozen=True)
class WanSpec:
    """One variant: its names, its checkpoint, its strides and its official defaults.

    `network` is transformer/config.json without keys at their default (for the miniatures, the keys that identify
    them); None stands for any size. `nets` are the folders of its checkpoint, which has so many `billions` of
    parameters. `sizes` are the official (width, height), the default first, and `flow_shift_480p` is the shift up to
    832 x 480 pixels. Strides are (frames, height, width); `patch` is the largest that the network cuts a latent into.
    `driving_prompt` is the text of a driving video. Each field from `num_inference_steps` to `segment_frame_length` but
    `flow_shift_480p` and `driving_prompt` is the default of the config key of its name.
    """

    name: str
    family: str
    task: Task
    hub_id: str | None
    network: Mapping[str, Any] | None = dataclasses.field(hash=False)
    sizes: tuple[tuple[int, int], ...]
    num_inference_steps: int
    flow_shift: float
    guidance_scale: float
    num_frames: int
    fps: int
    negative_prompt: str
    flow_shift_480p: float | None = None
    guidance_scale_2: float | None = None
    boundary_ratio: float | None = None
    prompt: str | None = None
    driving_prompt: str | None = None
    segment_frame_length: int | None = None
    billions: float | None = None
    nets: tuple[str, ...] = ("text_encoder", "transformer", "vae")
    vae_stride: tuple[int, int, int] = (4, 8, 8)
    patch: tuple[int, int, int] = (1, 2, 2)

    @property
    def model_type(self) -> str:
        """The task's name, as in the config."""
        return self.task.name

    @property
    def width(self) -> int:
        """The default width, that of the first of `sizes`."""
        return self.sizes[0][0]

    @property
    def height(self) -> int:
        """The default height, that of the first of `sizes`."""
        return self.sizes[0][1]

    @property
    def size_step(self) -> int:
        """What width and height in pixels are multiples of."""
        return max(self.vae_stride[axis] * self.patch[axis] for axis in (1, 2))

    @property
    def own(self) -> Mapping[str, Any]:
        """Keys of `network` that no checkpoint's config.json has."""
        return {key: value for key, value in (self.network or {}).items() if key == "log_scale"}

    @property
    def dims(self) -> Dims | None:
        """The dimensions in `network`."""
        return Dims.of(self.network) if self.network else None

    def latent_grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, height and width of a video of that many frames and pixels."""
        t, h, w = self.vae_stride
        return (num_frames - 1) // t + 1, height // h, width // w


_480P = ((832, 480), (480, 832))
_720P = ((1280, 720), (720, 1280))

_WAN21_T2V = WanSpec(
    name="wan2.1-t2v",  # any other size of the architecture
    family="wan2.1",
    task=T2V,
    hub_id=None,
    network=None,
    sizes=_480P,
    num_inference_steps=50,
    flow_shift=5.0,
    guidance_scale=5.0,
    num_frames=81,
    fps=16,
    negative_prompt=NEGATIVE_PROMPT,
)

_WAN21_VACE = dataclasses.replace(
    _WAN21_T2V,
    name="wan2.1-vace",
    task=VACE,
    flow_shift=16.0,
)

_WAN21_I2V = dataclasses.replace(
    _WAN21_T2V,
    name="wan2.1-i2v",
    task=I2V,
    num_inference_steps=40,
    flow_shift_480p=3.0,
    negative_prompt="镜头晃动，" + NEGATIVE_PROMPT,
    nets=("text_encoder", "image_encoder", "transformer", "vae"),
)

_WAN21_FLF2V = dataclasses.replace(
    _WAN21_I2V,
    name="wan2.1-flf2v",
    task=FLF2V,
    num_inference_steps=50,
    flow_shift=16.0,
    flow_shift_480p=None,
    negative_prompt="镜头切换，" + _WAN21_I2V.negative_prompt,
    sizes=_720P,
)

_WAN22_T2V = dataclasses.replace(
    _WAN21_T2V,
    name="wan2.2-t2v",
    family="wan2.2",
    sizes=_720P + _480P,
    num_inference_steps=40,
    flow_shift=12.0,
    guidance_scale=4.0,
    guidance_scale_2=3.0,
    boundary_ratio=0.875,
    nets=("text_encoder", "transformer", "transformer_2", "vae"),
)

_WAN22_I2V = dataclasses.replace(
    _WAN22_T2V,
    name="wan2.2-i2v",
    task=I2V_WITHOUT_CLIP,
    flow_shift=5.0,
    guidance_scale=3.5,
    guidance_scale_2=3.5,
    boundary_ratio=0.9,
)

_WAN22_VACE = dataclasses.replace(  # recipe: examples/wan2.2_vace_fun of github.com/aigc-apps/VideoX-Fun, with UniPC
    _WAN22_T2V,
    name="wan2.2-vace",
    task=VACE,
    sizes=_480P + _720P,
    num_inference_steps=50,
    guidance_scale=5.0,
    guidance_scale_2=5.0,
)

_WAN22_TI2V = dataclasses.replace(
    _WAN21_T2V,
    name="wan2.2-ti2v",
    family="wan2.2",
    task=TI2V,
    sizes=((1280, 704), (704, 1280)),
    num_frames=121,
    fps=24,
    vae_stride=(4, 16, 16),
)

_WAN22_ANIMATE = dataclasses.replace(
    _WAN21_T2V,
    name="wan2.2-animate",
    family="wan2.2",
    task=ANIMATE,
    sizes=_720P,
    num_inference_steps=20,
    guidance_scale=1.0,
    num_frames=77,
    fps=30,
    prompt=ANIMATE_PROMPT,
    nets=("text_encoder", "image_encoder", "transformer", "vae"),
)

_WAN22_ANIMATE2 = dataclasses.replace(
    _WAN21_T2V,
    name="wan2.2-animate2",
    family="wan2.2",
    task=ANIMATE2,
    sizes=((640, 800), (800, 640)),
    num_inference_steps=40,
    guidance_scale=3.0,
    num_frames=81,
    segment_frame_length=81,
    fps=24,
    negative_prompt="",
    driving_prompt="人物动作的参考视频",  # "reference video of a person's motion"
    nets=("text_encoder", "image_encoder", "transformer", "vae"),
)

_WAN22_S2V = dataclasses.replace(
    _WAN21_T2V,
    name="wan2.2-s2v",
    family="wan2.2",
    task=S2V,
    sizes=((1024, 704), (704, 1024)),
    num_inference_steps=40,
    flow_shift=3.0,
    guidance_scale=4.5,
    num_frames=77,
    segment_frame_length=80,
    negative_prompt=S2V_NEGATIVE_PROMPT,
    nets=("text_encoder", "audio_encoder", "transformer", "vae"),
    patch=(4, 8, 8),  # of FramePack: sizes are multiples of 64
)

_TINY: dict[str, Any] = {
    "sizes": ((96, 96),),
    "num_inference_steps": 12,
    "flow_shift": 3.0,
    "guidance_scale": 2.0,
    "num_frames": 17,
    "fps": 8,
    "negative_prompt": "",
}

_14B: dict[str, Any] = {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}
_14B |= {"in_channels": 16, "out_channels": 16, "text_dim": 4096}
_1_3B = {**_14B, "num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
_5B = {**_14B, "num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
_14B_VACE = {**_14B, "vace_in_channels": 96, "vace_layers": [*range(0, 40, 5)]}
_14B_IMAGE = {**_14B, "in_channels": 36}
_14B_TOKENS = {**_14B_IMAGE, "image_dim": 1280, "added_kv_proj_dim": 5120}  # of the image encoder
_MINIATURE = {"num_layers": 6, "num_attention_heads": 8, "attention_head_dim": 16}

_ROWS = (
    dataclasses.replace(
        _WAN21_T2V,
        name="wan2.1-t2v-1.3b",
        hub_id="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        billions=7.23,
        network=_1_3B,
    ),
    dataclasses.replace(
        _WAN21_T2V,
        name="wan2.1-t2v-14b",
        hub_id="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        billions=20.1,
        network=_14B,
        sizes=_720P + _480P,
    ),
    _WAN21_T2V,
    dataclasses.replace(
        _WAN21_VACE,
        name="wan2.1-vace-1.3b",
        hub_id="Wan-AI/Wan2.1-VACE-1.3B-diffusers",
        billions=7.96,
        network={**_1_3B, "vace_in_channels": 96, "vace_layers": [*range(0, 30, 2)]},
    ),
    dataclasses.replace(
        _WAN21_VACE,
        name="wan2.1-vace-14b",
        hub_id="Wan-AI/Wan2.1-VACE-14B-diffusers",
        billions=23.15,
        network=_14B_VACE,
        sizes=_720P + _480P,
    ),
    _WAN21_VACE,
    dataclasses.replace(
        _WAN21_I2V,
        name="wan2.1-i2v-14b-480p",
        hub_id="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        billions=22.83,
        network=_14B_TOKENS,
    ),
    dataclasses.replace(
        _WAN21_I2V,
        name="wan2.1-i2v-14b-720p",
        hub_id="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
        billions=22.83,
        network=_14B_TOKENS,
        sizes=_720P,
    ),
    _WAN21_I2V,
    dataclasses.replace(
        _WAN21_FLF2V,
        name="wan2.1-flf2v-14b",
        hub_id="Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
        billions=22.83,
        network={**_14B_TOKENS, "pos_embed_seq_len": 514},
    ),
    _WAN21_FLF2V,
    dataclasses.replace(
        _WAN22_T2V, name="wan2.2-t2v-a14b", hub_id="Wan-AI/Wan2.2-T2V-A14B-Diffusers", network=_14B, billions=34.38
    ),
    _WAN22_T2V,
    dataclasses.replace(
        _WAN22_I2V,
        name="wan2.2-i2v-a14b",
        hub_id="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        network=_14B_IMAGE,
        billions=34.39,
    ),
    _WAN22_I2V,
    dataclasses.replace(
        _WAN22_VACE,
        name="wan2.2-vace-fun-a14b",
        hub_id="linoyts/Wan2.2-VACE-Fun-14B-diffusers",
        billions=40.49,
        network=_14B_VACE,
    ),
    _WAN22_VACE,
    dataclasses.replace(
        _WAN22_TI2V,
        name="wan2.2-ti2v-5b",
        hub_id="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        billions=11.39,
        network=_5B,
    ),
    _WAN22_TI2V,
    dataclasses.replace(
        _WAN22_ANIMATE,
        name="wan2.2-animate-14b",
        hub_id="Wan-AI/Wan2.2-Animate-14B-Diffusers",
        billions=23.71,
        network={**_14B_TOKENS, "latent_channels": 16},
    ),
    _WAN22_ANIMATE,
    dataclasses.replace(
        _WAN22_ANIMATE2,
        name="wan2.2-animate2-14b",
        hub_id="Wan-AI/Wan2.2-Animate-2-14B",
        billions=22.83,
        network=_14B_TOKENS,
    ),
    dataclasses.replace(
        _WAN22_ANIMATE2,
        name="wan2.2-animate2-14b-distilled",
        hub_id=None,
        network={**_14B_TOKENS, "log_scale": -1.3},
        num_inference_steps=10,
        guidance_scale=1.0,
    ),
    _WAN22_ANIMATE2,
    dataclasses.replace(
        _WAN22_S2V,
        name="wan2.2-s2v-14b",
        hub_id="FastVideo/Wan2.2-S2V-14B-Diffusers",
        billions=22.42,
        network={**_14B, "audio_dim": 1024},
    ),
    _WAN22_S2V,
    dataclasses.replace(  # the miniatures, in models/wan_tiny and models/wan_tiny_i2v
        _WAN21_T2V,
        name="wan-tiny-t2v",
        network={**_MINIATURE, "in_channels": 8},
        **_TINY,
    ),
    dataclasses.replace(
        _WAN22_I2V,
        name="wan-tiny-i2v",
        network={**_MINIATURE, "in_channels": 20},
        guidance_scale_2=None,
        boundary_ratio=None,
        nets=_WAN21_T2V.nets,  # one expert
        **_TINY,
    ),
)

VARIANTS: dict[str, WanSpec] = {spec.name: spec for spec in _ROWS}


def get(name: str) -> WanSpec:
    """The variant of that exact name.

    Raises:
      UserError: no variant has it.
    """
    if name not in VARIANTS:
        raise UserError(f"model_name {name!r} is not a variant; choose one of {', '.join(VARIANTS)}.")
    return VARIANTS[name]


def candidates(model_name: str, model_type: str | None = None) -> tuple[WanSpec, ...]:
    """The variants that a config may mean: one for the name of a variant, several for the name of a family.

    Raises:
      UserError: no variant or family has that name, or it has no such model type.
    """
    name = model_name.lower()
    named = tuple(spec for spec in VARIANTS.values() if name in (spec.name, spec.family))
    if not named:
        names = sorted({spec.family for spec in VARIANTS.values()} | set(VARIANTS))
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise UserError(
            f"model_name {model_name!r} is neither a variant nor a family; the nearest is {near!r} "
            f"(known: {', '.join(names)})."
        )
    found = tuple(spec for spec in named if model_type is None or spec.model_type == model_type.upper())
    if not found:
        types = ", ".join(sorted({spec.model_type for spec in named}))
        raise UserError(f"model_type {model_type!r} does not exist for model_name {model_name!r}; write {types}.")
    return found


def matching(transformer_config: Mapping[str, Any], among: Sequence[WanSpec] = ()) -> tuple[WanSpec, ...]:
    """The variants to which a transformer/config.json may belong: rows with its dimensions, else rows for any size.

    `among` is all rows by default.

    Raises:
      UserError: the dimensions are missing.
    """
    dims = Dims.of(transformer_config)
    rows = among or VARIANTS.values()
    fitting = [spec for spec in rows if spec.dims in (dims, None) and _same_kind(spec, transformer_config)]
    return tuple(spec for spec in fitting if spec.dims) or tuple(fitting)


def check(spec: WanSpec, transformer_config: Mapping[str, Any]) -> None:
    """Refuses a checkpoint of another variant than the config names.

    Args:
      spec: the variant named.
      transformer_config: the checkpoint's transformer/config.json.

    Raises:
      UserError: it is of another variant; both are named, and what to write instead.
    """
    if matching(transformer_config, (spec,)):
        return
    kind = transformer_config.get("_class_name") or spec.task.transformer_class
    given = f"model_name is {spec.name}, but the checkpoint holds a {kind} with {Dims.of(transformer_config)}"
    if actual := next(iter(matching(transformer_config)), None):
        raise UserError(
            f"{given}, which is {actual.name}; write model_name: {actual.name}, or give the checkpoint of {spec.name}."
        )
    hub_id = f", {spec.hub_id}" if spec.hub_id else ""
    raise UserError(f"{given}, which is not a variant known here; give the checkpoint of {spec.name}{hub_id}.")


def _same_kind(spec: WanSpec, transformer_config: Mapping[str, Any]) -> bool:
    """Whether class, channels and image tokens are those of the model type."""
    task, channels = spec.task, transformer_config.get("in_channels")
    latents = transformer_config.get("out_channels") or channels
    image = transformer_config.get("image_dim") is not None
    positions = transformer_config.get("pos_embed_seq_len") is not None  # of two images
    return (
        transformer_config.get("_class_name", task.transformer_class) == task.transformer_class
        and isinstance(latents, int)
        and channels == (2 * latents + spec.vae_stride[0] if task.extra_channels else latents)  # Fun-Control has more
        and image == ("image_encoder" in spec.nets)
        and (positions == task.two_images or (task.two_images and spec.dims is None))
    )
