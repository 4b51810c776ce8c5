"""The official code (github.com/Wan-Video/Wan2.2, package wan22) on the CPU in float32, and tiny checkpoints for it.

Its modules are imported one by one, since the package's own __init__ needs CUDA and every dependency of every task.
Three things of them are replaced: flash-attn by torch's attention, CUDA by the CPU, pickles by safetensors. A
checkpoint is one folder that both programs read:

    checkpoint = official.write_checkpoint(tmp_path, "wan2.2-t2v")
    latents, video = official.generate(official.pipeline(checkpoint, "t2v-A14B"), "a cat", size=(64, 64), seed=0)
    request.load([..., *official.words(checkpoint)])
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import math
import runpy
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import safetensors.torch
import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from maxdiffusion.models.umt5.config import UMT5Config
from maxdiffusion.models.vae.config import WAN21, WAN22
from maxdiffusion.variants import VARIANTS

ROOT = Path(__file__).parents[2]

# Sizes in the words of the official constructors.
TRANSFORMER: Mapping[str, Any] = dict(dim=24, num_heads=2, num_layers=2, ffn_dim=32, freq_dim=64, text_dim=32)
T5: Mapping[str, Any] = dict(vocab_size=512, dim=32, dim_attn=32, dim_ffn=64, num_heads=4, encoder_layers=2)
VAE21: Mapping[str, Any] = dict(dim=8)
VAE22: Mapping[str, Any] = dict(dim=8, dec_dim=12)
# The image encoder's width is fixed by the transformer that reads it; its feed-forwards are narrow instead.
CLIP: Mapping[str, Any] = dict(
    vision_layers=2, vision_heads=16, vision_mlp_ratio=0.05, text_layers=1, text_dim=32, text_heads=2, vocab_size=512
)

# 25 hidden states, as the transformer reads.
WAV2VEC2: Mapping[str, Any] = dict(
    hidden_size=10,
    intermediate_size=12,
    num_hidden_layers=24,
    num_attention_heads=2,
    conv_dim=[8] * 7,
    conv_bias=True,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    feat_extract_norm="layer",
    do_stable_layer_norm=True,
    vocab_size=4,
    tie_last_hidden_states=True,  # the last one is normed, as in transformers 4.51, with which the model was published
)
SOUND = "wav2vec2-large-xlsr-53-english"  # its folder
FP32 = tuple(f"{each}_dtype=float32" for each in ("weights", "activations", "text_encoder", "vae"))
ONE = ("attention=dot_product", "ici_data_parallelism=-1", "ici_context_parallelism=1")  # no device shares a video

# The tasks of `wan.configs.WAN_CONFIGS`: module and class. `lightning` leaves guidance out and is off.
_PIPELINES = {
    "t2v-A14B": ("text2video", "WanT2V"),
    "i2v-A14B": ("image2video", "WanI2V"),
    "ti2v-5B": ("textimage2video", "WanTI2V"),
    "animate-14B": ("animate", "WanAnimate"),
    "s2v-14B": ("speech2video", "WanS2V"),
}


# ---- the modules


def load(name: str) -> types.ModuleType:
    """The official module of that name below `wan`, such as utils.fm_solvers."""
    _packages()
    with _absent_dependencies():
        module = importlib.import_module(f"wan.{name}")
    for each in [module for key, module in sys.modules.items() if key.startswith("wan.")]:
        if getattr(each, "torch", None) is torch:
            each.torch = _CPUTorch("torch")
    return module


class _CPUTorch(types.ModuleType):
    """torch without CUDA: its devices are the CPU, its synchronisation does nothing, its files are safetensors."""

    cuda = types.SimpleNamespace(
        **{name: getattr(torch.cuda, name) for name in ("amp", "is_available")},
        synchronize=lambda: None,
        empty_cache=lambda: None,
    )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, name: Any, *_: Any) -> torch.device:
        return torch.device("cpu" if str(name).startswith("cuda") else name)

    def load(self, path: str, **_: Any) -> dict[str, torch.Tensor]:
        return safetensors.torch.load_file(path)


@functools.cache
def _packages() -> None:
    """Packages whose __init__ is not run, then the attention that all of their modules import."""
    spec = importlib.util.find_spec("wan")
    assert spec and spec.origin, "the package wan22 is not installed; see requirements-official.txt"
    for name in ("wan", "wan.modules"):
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(Path(spec.origin).parent.joinpath(*name.split(".")[1:]))]
    importlib.import_module("wan.modules.attention").flash_attention = attention
    with mock.patch.object(torch.cuda, "current_device", return_value="cpu"):  # a default argument
        importlib.import_module("wan.modules.t5")
    importlib.import_module("wan.modules.model").WanModel.ignore_for_config = []  # so that `text_dim` is stored


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None = None, causal=False, **_: Any
) -> torch.Tensor:
    """What `wan.modules.attention.flash_attention` computes, in the dtype of its operands; b s n d."""
    mask = None if k_lens is None else (torch.arange(k.size(1)) < k_lens[:, None])[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2)


@contextmanager
def _absent_dependencies() -> Iterator[None]:
    """Stands in for packages that the modules import and that a tiny run does not need.

    Of torchvision, whose builds differ with torch's, two transforms are used; they are here in the same arithmetic.
    """
    functional = types.SimpleNamespace(to_tensor=_to_tensor)
    transforms = types.SimpleNamespace(
        functional=functional, Compose=_Compose, Normalize=_Normalize, Resize=mock.Mock, ToTensor=mock.Mock
    )
    transforms.InterpolationMode = types.SimpleNamespace(BICUBIC="bicubic")
    vision = types.SimpleNamespace(transforms=transforms, utils=mock.MagicMock())
    stubs: dict[str, Any] = {
        "torchvision": vision,
        "torchvision.transforms": transforms,
        "torchvision.transforms.functional": functional,
        **{name: mock.MagicMock() for name in ("decord", "peft", "librosa") if importlib.util.find_spec(name) is None},
    }
    own = {name: sys.modules[name] for name in stubs if name in sys.modules}
    sys.modules.update(stubs)
    try:
        yield
    finally:  # other packages ask for them, and shall not find these
        for name in stubs:
            del sys.modules[name]
        sys.modules.update(own)


def _to_tensor(image: Any) -> torch.Tensor:
    """A PIL image as float32 c h w in 0..1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


class _Compose:
    def __init__(self, transforms: list[Any]):
        self.transforms = transforms


class _Normalize:
    def __init__(self, mean: list[float], std: list[float]):
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return (image - self.mean) / self.std


def scheduler(solver: str, steps: int, shift: float) -> Any:
    """The scheduler of "unipc" or "dpm++" as the official pipelines set it."""
    if solver == "unipc":
        made = load("utils.fm_solvers_unipc").FlowUniPCMultistepScheduler(shift=1, use_dynamic_shifting=False)
        made.set_timesteps(steps, device="cpu", shift=shift)
        return made
    solvers = load("utils.fm_solvers")
    made = solvers.FlowDPMSolverMultistepScheduler(shift=1, use_dynamic_shifting=False)
    solvers.retrieve_timesteps(made, device="cpu", sigmas=solvers.get_sampling_sigmas(steps, shift))
    return made


# ---- a checkpoint of tiny random nets


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module with every parameter drawn: gains near 1, biases near 0, kernels that keep activations of order one.

    The official initialisation has zeros, the whole output layer among them.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1 or name.endswith("gamma"):
                p.copy_(0.1 * noise + (not name.endswith("bias")))
            else:
                p.copy_(noise * math.prod(p.shape[1:]) ** -0.5)
    return module.eval()


def transformer(model_name: str, **sizes: Any) -> torch.nn.Module:
    """A tiny transformer of a variant of `wan.modules.model.WanModel`: the channels are the variant's."""
    network = next(each.network for name, each in VARIANTS.items() if each.network and name.startswith(model_name))
    channels = network["in_channels"], network["out_channels"]
    kind = "i2v" if channels[0] > channels[1] else "t2v"
    sizes = {**TRANSFORMER, "model_type": kind, "in_dim": channels[0], "out_dim": channels[1], **sizes}
    return load("modules.model").WanModel(**sizes)


def write_checkpoint(
    folder: Path,
    model_name: str,
    *,
    transformers: Mapping[str, torch.nn.Module] | None = None,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Writes tiny random nets of a variant.

    The official files are in `folder/official`; beside it is what the diffusers layout has besides weights.

    Args:
      folder: a new or empty folder.
      model_name: a variant of any size, such as wan2.2-t2v.
      transformers: by their folders in the diffusers layout, in place of those of `transformer`.
      config: more keys of transformer/config.json, which follow from no shape.
      seed: of the numbers.

    Returns:
      `folder`.
    """
    spec, own = VARIANTS[model_name], folder / "official"
    own.mkdir(parents=True)
    if transformers is None:
        names = [name for name in spec.nets if name.startswith("transformer")]
        transformers = {name: randomize(transformer(model_name), seed + i) for i, name in enumerate(names)}
    for name, net in transformers.items():
        net.save_pretrained(own / _subfolder(name, spec.nets))
        heads = {"attention_head_dim": net.config.dim // net.config.num_heads}
        _write_json(folder / name, {"_class_name": spec.task.transformer_class, **heads, **(config or {})})

    _save(load("modules.t5").umt5_xxl(encoder_only=True, **T5), own / "text_encoder.safetensors", seed)
    umt5 = UMT5Config(
        vocab_size=T5["vocab_size"],
        d_model=T5["dim"],
        d_kv=T5["dim_attn"] // T5["num_heads"],
        d_ff=T5["dim_ffn"],
        num_layers=T5["encoder_layers"],
        num_heads=T5["num_heads"],
    )
    _write_json(folder / "text_encoder", {"architectures": ["UMT5EncoderModel"], **dataclasses.asdict(umt5)})

    wan22 = spec.vae_stride[1] == 16
    sizes, base = (VAE22, WAN22) if wan22 else (VAE21, WAN21)
    net = load("modules.vae2_2" if wan22 else "modules.vae2_1").WanVAE_(
        z_dim=base.z_dim, temperal_downsample=[False, True, True], **sizes
    )
    _save(net, own / "vae.safetensors", seed)
    mean, gain = vae(folder, "2.2" if wan22 else "2.1").scale
    vae_config = dataclasses.replace(
        base,
        base_dim=sizes["dim"],
        decoder_base_dim=sizes.get("dec_dim"),
        latents_mean=tuple(mean.tolist()),
        latents_std=tuple((1 / gain).tolist()),
    )
    _write_json(folder / "vae", {"_class_name": "AutoencoderKLWan", **dataclasses.asdict(vae_config)})

    if "image_encoder" in spec.nets:
        net = load("modules.animate.clip").clip_xlm_roberta_vit_h_14(**CLIP)
        _save(net, own / "image_encoder.safetensors", seed)
        vision = net.visual
        _write_json(
            folder / "image_encoder",
            {
                "architectures": ["CLIPVisionModel"],
                "hidden_size": vision.dim,
                "intermediate_size": int(vision.dim * vision.mlp_ratio),
                "num_hidden_layers": vision.num_layers,
                "num_attention_heads": vision.num_heads,
                "patch_size": vision.patch_size,
                "hidden_act": "gelu",
            },
        )
    if "audio_encoder" in spec.nets:
        encoder = Wav2Vec2ForCTC(Wav2Vec2Config(**WAV2VEC2))
        randomize(encoder, seed).save_pretrained(own / SOUND)
    runpy.run_path(str(ROOT / "scripts" / "make_random_checkpoint.py"))["write_tokenizer"](folder / "tokenizer")
    (folder / "scheduler").mkdir()
    index = {"_class_name": spec.task.pipeline_classes[0], "_diffusers_version": diffusers.__version__}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _subfolder(net: str, nets: tuple[str, ...]) -> str:
    """Where the official repositories have a transformer; of two, the first is for high noise."""
    if "transformer_2" not in nets:
        return "."
    return {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}[net]


def _save(net: torch.nn.Module, path: Path, seed: int) -> None:
    safetensors.torch.save_file(randomize(net, seed).state_dict(), path)


def _write_json(folder: Path, content: Mapping[str, Any]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))


def words(checkpoint: Path) -> list[str]:
    """The command's words for a checkpoint of `write_checkpoint`: the folder, and its official files as they are."""
    own = checkpoint / "official"
    files = {path.stem: path for path in own.glob("*_encoder.safetensors")} | {"vae": own / "vae.safetensors"}
    files |= {"audio_encoder": own / SOUND} if (own / SOUND).is_dir() else {}
    nets = tuple(path.name for path in checkpoint.glob("transformer*"))
    for net in nets:
        files[net] = own / _subfolder(net, nets) / "diffusion_pytorch_model.safetensors"
    return [f"pretrained_model_name_or_path={checkpoint}", *(f"{net}_file={file}" for net, file in files.items())]


# ---- the official objects over a checkpoint


@contextmanager
def _tiny() -> Iterator[None]:
    """Gives the sizes of `write_checkpoint` to the constructors that the official classes call without."""
    with ExitStack() as stack:
        for module, name, sizes in (
            ("modules.t5", "umt5_xxl", T5),
            ("modules.vae2_1", "_video_vae", VAE21),
            ("modules.vae2_2", "_video_vae", VAE22),
            ("modules.animate.clip", "clip_xlm_roberta_vit_h_14", CLIP),
        ):
            owner = load(module)
            stack.enter_context(mock.patch.object(owner, name, _sized(getattr(owner, name), sizes)))
        yield


def _sized(function: Callable[..., Any], sizes: Mapping[str, Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **{**kwargs, **sizes})


def vae(checkpoint: Path, version: str = "2.1") -> Any:
    """The official `Wan2_1_VAE` or `Wan2_2_VAE` of a checkpoint; videos and latents are lists of c f h w."""
    module = load("modules.vae" + version.replace(".", "_"))
    with _tiny():
        return getattr(module, f"Wan{version.replace('.', '_')}_VAE")(
            vae_pth=str(checkpoint / "official" / "vae.safetensors"), device="cpu"
        )


def clip(checkpoint: Path) -> Any:
    """The official `CLIPModel` of a checkpoint with an image encoder."""
    with _tiny():
        return load("modules.animate.clip").CLIPModel(
            torch.float32,
            "cpu",
            str(checkpoint / "official" / "image_encoder.safetensors"),
            str(checkpoint / "tokenizer"),
        )


def t5(checkpoint: Path) -> Any:
    """The official `T5EncoderModel` of a checkpoint; called with texts and a device it gives a list of k e."""
    with _tiny():
        return load("modules.t5").T5EncoderModel(
            text_len=512,
            dtype=torch.float32,
            device="cpu",
            checkpoint_path=str(checkpoint / "official" / "text_encoder.safetensors"),
            tokenizer_path=str(checkpoint / "tokenizer"),
        )


def pipeline(checkpoint: Path, task: str, **config: Any) -> Any:
    """The official pipeline of a task ("t2v-A14B", "i2v-A14B", "ti2v-5B", "animate-14B", "s2v-14B") over a checkpoint.

    `config` are keys over those of `wan.configs`; of a checkpoint with one transformer, both experts are it.
    """
    module, name = _PIPELINES[task]
    cls = getattr(load(module), name)
    keys = copy.deepcopy(load("configs").WAN_CONFIGS[task])
    nets = tuple(path.name for path in checkpoint.glob("transformer*"))
    keys.update(
        t5_dtype=torch.float32,
        param_dtype=torch.float32,
        t5_checkpoint="text_encoder.safetensors",
        t5_tokenizer="../tokenizer",
        clip_checkpoint="image_encoder.safetensors",
        clip_tokenizer="../tokenizer",
        vae_checkpoint="vae.safetensors",
        high_noise_checkpoint=_subfolder("transformer", nets),
        low_noise_checkpoint=_subfolder("transformer_2", nets),
    )
    keys.update(config)
    guided = {"lightning": False} if "lightning" in inspect.signature(cls).parameters else {}
    with _tiny():
        return cls(keys, str(checkpoint / "official"), **guided)


def generate(pipe: Any, *args: Any, **kwargs: Any) -> tuple[list[np.ndarray], np.ndarray]:
    """Runs `pipe.generate`.

    Returns:
      The latents of each call of the VAE's decoder, f h w c, and the video in -1..1, f h w c.
    """
    latents, decode = [], pipe.vae.decode

    def recorded(zs: Any) -> Any:
        latents.extend(channels_last(z) for z in zs)
        return decode(zs)

    with (
        mock.patch.object(pipe.vae, "decode", recorded),
        warnings.catch_warnings(action="ignore"),
    ):  # that CUDA is absent
        return latents, channels_last(pipe.generate(*args, offload_model=False, **kwargs))


def noise(seed: int, channels: int, frames: int, height: int, width: int) -> np.ndarray:
    """The initial noise of the official T2V with that seed on a CPU; the shape is that of the latents; f h w c."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return channels_last(torch.randn(channels, frames, height, width, generator=generator))


def channels_last(x: torch.Tensor) -> np.ndarray:
    """C f h w -> f h w c."""
    return np.ascontiguousarray(x.detach().permute(1, 2, 3, 0).numpy())
