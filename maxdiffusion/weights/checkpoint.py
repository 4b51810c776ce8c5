"""A checkpoint folder in the diffusers layout: configs and tensors of its networks, without weights and without jax."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maxdiffusion import variants
from maxdiffusion.errors import UserError
from maxdiffusion.models.clip.config import CLIPVisionConfig
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.models.umt5.config import UMT5Config
from maxdiffusion.models.vae.config import VAEConfig
from maxdiffusion.models.wav2vec2.config import Wav2Vec2Config
from maxdiffusion.runtime import paths
from maxdiffusion.runtime.paths import AnyPath
from maxdiffusion.variants import VARIANTS, WanSpec
from maxdiffusion.weights import dimensions, net_file
from maxdiffusion.weights.headers import read_json, readable
from maxdiffusion.weights.lora.merge import Merge
from maxdiffusion.weights.rule import Rule
from maxdiffusion.weights.sources import TensorSource
from maxdiffusion.weights.tables import clip, dit, umt5, vae, wav2vec2

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class NetSpec:
    """How one network of a checkpoint is read.

    Attributes:
      classes: the class names of which its config.json must have one; none for the variant's `transformer_class`.
      parse: config.json -> the network's config.
      rules: the name table.
      ignored: regular expressions of tensors that the network knowingly does not use.
    """

    classes: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], Any]
    rules: Sequence[Rule]
    ignored: Sequence[str] = ()


# The reference loads the first where a file has it and never uses it; the second are fixed blur filters; the third are
# of the sparse attention (VSA) that FastWan 2.1 was trained with, which is computed densely here.
_UNUSED = (
    r"blocks\.\d+\.attn2\.norm_added_q\.weight",
    r"motion_encoder\.enc\.net_app\.convs\.\d+\.\w+\.0\.kernel",
    r"blocks\.\d+\.to_gate_compress\.(weight|bias)",
)
_TRANSFORMER = NetSpec((), DiTConfig.from_json, dit.RULES, _UNUSED)
_COMFYUI = ("spiece_model", "logit_scale")  # the tokenizer, and what only CLIP's text encoders use
_CLIP = ("CLIPVisionModel", "CLIPVisionModelWithProjection")
_WAV2VEC2 = ("Wav2Vec2ForCTC", "Wav2Vec2Model", "Wav2Vec2ForPreTraining")

NETS = {  # by their folders
    "text_encoder": NetSpec(("UMT5EncoderModel",), UMT5Config.from_json, umt5.RULES, _COMFYUI),
    "image_encoder": NetSpec(_CLIP, CLIPVisionConfig.from_json, clip.RULES, clip.IGNORED),
    "audio_encoder": NetSpec(_WAV2VEC2, Wav2Vec2Config.from_json, wav2vec2.RULES, wav2vec2.IGNORED),
    "transformer": _TRANSFORMER,
    "transformer_2": _TRANSFORMER,
    "vae": NetSpec(("AutoencoderKLWan",), VAEConfig.from_json, vae.RULES),
}


@dataclasses.dataclass(frozen=True)
class NetFiles:
    """One network of an opened checkpoint.

    Attributes:
      path: the folder or file of its weights.
      config: the network's own config dataclass.
      tensors: by their diffusers names.
      left: the number of tensors of other nets in its file, by what they are; none of them is used.
      loras: that `tensors` are merged with.
    """

    path: AnyPath
    config: Any
    tensors: Mapping[str, TensorSource]
    left: Mapping[str, int] = dataclasses.field(default_factory=dict)
    loras: tuple[Merge, ...] = ()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; `nets` is keyed by the networks' folders."""

    folder: AnyPath
    nets: Mapping[str, NetFiles]

    @property
    def configs(self) -> dict[str, Any]:
        """The networks' configs, by folder."""
        return {name: net.config for name, net in self.nets.items()}

    @functools.cached_property
    def digests(self) -> Mapping[str, str]:
        """SHA-256 of each network and of the tokenizer: equal for copies of one checkpoint in different places.

        A network's is of its config, its headers, its LoRAs and the first bytes of `SAMPLED` of its tensors, evenly
        chosen: other weights of the same shapes have another digest, and a bucket is asked few times.

        Raises:
          UserError: a file cannot be read.
        """
        return {name: _digest(net) for name, net in self.nets.items()} | {"tokenizer": _tokenizer(self.folder)}

    def digest(self) -> str:
        """SHA-256 of all `digests`."""
        return hashlib.sha256(repr(sorted(self.digests.items())).encode()).hexdigest()


SAMPLED = 256  # tensors of a network. A file of 2.8 GB on a loaded machine: 0.31 s from disk, 0.05 s from memory
_STRIP = 4096  # bytes of each
_TOKENIZER = (  # the files that `conditioning.text` reads
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
)


def _digest(net: NetFiles) -> str:
    tensors = sorted(net.tensors.items())
    headers = [(key, each.stored_as, each.shape, each.file.name, each.start) for key, each in tensors]
    loras = [(each.lora.digest, each.strength) for each in net.loras]
    found = hashlib.sha256(repr([net.config, headers, loras]).encode())
    count = min(len(tensors), SAMPLED)
    chosen = [tensors[number * len(tensors) // count][1] for number in range(count)]
    with readable(net.path):
        for strip in paths.each(net.path, _strip, chosen):
            found.update(strip)
    return found.hexdigest()


def _strip(tensor: TensorSource) -> bytes:
    return paths.read(tensor.file, tensor.start, tensor.start + min(tensor.nbytes, _STRIP))


def _tokenizer(folder: AnyPath) -> str:
    found = hashlib.sha256()
    with readable(folder / "tokenizer"):
        for name in sorted({*paths.names(folder / "tokenizer")} & {*_TOKENIZER}):
            content = (folder / "tokenizer" / name).read_bytes()
            found.update(f"{name} {len(content)} ".encode() + content)
    return found.hexdigest()


def open_checkpoint(
    folder: AnyPath,
    variant: WanSpec = VARIANTS["wan2.1-t2v"],
    files: Mapping[str, AnyPath] | None = None,
    transformer: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Opens a local checkpoint folder.

    Args:
      folder: the folder that holds model_index.json.
      variant: the variant that it must be of.
      files: network -> the file, index of shards or folder that is read in place of its weights; its config.json may
        then be absent, and a transformer's tensors give its size.
      transformer: content of transformer/config.json, where it was read before.

    Raises:
      UserError: a file is absent or damaged, a class or the variant is not the expected one, or a config is not
        supported.
    """
    files = files or {}
    for name in files.keys() - {*variant.nets}:
        raise UserError(f"{name}_file={files[name]} is not used by a model without {name}; leave it out.")
    _check_folder(folder, variant, files)
    nets: dict[str, NetFiles] = {}
    for name in variant.nets:
        spec, config = NETS[name], folder / name / "config.json"
        content: Mapping[str, Any] = {}
        if name == "audio_encoder" and name in files and not config.exists():  # beside its weights
            config = (files[name] if files[name].is_dir() else files[name].parent) / "config.json"
        if name not in files or config.exists():
            content = (transformer if name == "transformer" else None) or dimensions.renamed(read_json(config))
            key = "_class_name" if "_class_name" in content else "architectures"  # diffusers, transformers
            # A file decides by its own shapes what it is, beside the text encoder and VAE of text to video.
            plain = ("WanTransformer3DModel",) if name in files else ()
            _expect(config, content, key, *(spec.classes or (variant.task.transformer_class, *plain)))
        path = files.get(name, folder / name)
        tensors, left = net_file.read(path, name, given=name in files)
        if left:
            log.info("%s: used for the %s alone; left: %s", path, net_file.KINDS[name].what, net_file.listed(left))
        if spec is _TRANSFORMER:
            if name in files:
                shapes = {key: tensor.shape for key, tensor in tensors.items()}
                content = dimensions.transformer_config(shapes, content, str(path))
            variants.check(variant, content)
            content = {**content, **variant.own}
        nets[name] = NetFiles(path, spec.parse(content), tensors, left)
        if name == "vae" and name in files:
            _check_channels(nets[name])
    if "audio_encoder" in nets:
        _check_audio(nets["audio_encoder"], nets["transformer"])
    return Checkpoint(folder, nets)


def _check_audio(encoder: NetFiles, transformer: NetFiles) -> None:
    """Checks that the transformer reads what the audio encoder makes."""
    made = encoder.config.hidden_states, encoder.config.hidden_size
    read = transformer.config.adapter.audio_layers, transformer.config.adapter.audio_dim
    if made != read:
        raise UserError(
            f"the audio encoder {encoder.path} makes {made[0]} hidden states of size {made[1]}, and the transformer "
            f"{transformer.path} reads {read[0]} of {read[1]}; give wav2vec2-large-xlsr-53-english, as it was trained "
            "with."
        )


def _check_channels(vae: NetFiles) -> None:
    """Checks that a VAE has the latent channels of its config, so that one of another family is named as such."""
    shape, z_dim = vae.tensors["decoder.conv_in.weight"].shape, vae.config.z_dim
    if len(shape) == 5 and shape[1] != z_dim:
        raise UserError(
            f"vae_file={vae.path} is a VAE of {shape[1]} latent channels and this model has {z_dim}; give that of "
            "Wan2.1 for 16 channels, or that of Wan2.2 for 48."
        )


def _check_folder(folder: AnyPath, variant: WanSpec, files: Mapping[str, AnyPath]) -> None:
    needed = (*variant.nets, "tokenizer", "scheduler")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a checkpoint folder in the diffusers layout or a hub id.")
    if "transformer_2" not in variant.nets and (folder / "transformer_2").is_dir():
        raise UserError(
            f"{folder} holds two experts (transformer and transformer_2), but {variant.name} has one; write "
            "model_name: wan2.2-t2v-a14b, wan2.2-i2v-a14b or wan2.2-vace-fun-a14b, or give another checkpoint."
        )
    index = folder / "model_index.json"
    if not index.exists():
        raise UserError(
            official_layout(folder)
            or f"{folder} has no model_index.json, so it is not a checkpoint in the diffusers layout; "
            f"give the folder that holds model_index.json, {', '.join(needed)}."
        )
    _expect(index, read_json(index), "_class_name", *variant.task.pipeline_classes, *variants.FEW_STEP_PIPELINES)
    for name in needed:
        if name not in files and not (folder / name).is_dir():
            raise UserError(f"{folder} has no folder {name!r}; the checkpoint is incomplete: download it again.")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.exists():
        read_json(scheduler)


def official_layout(folder: AnyPath) -> str | None:
    """Why a folder of an official repository cannot be the whole checkpoint; None for any other folder."""
    pickles = sorted(path.name for path in folder.glob("*.pth"))
    if not pickles or (folder / "model_index.json").exists():
        return None
    nets = [name for name in ("high_noise_model", "low_noise_model") if (folder / name).is_dir()]
    return (
        f"{folder} is in an official repository's own layout, with torch pickles ({', '.join(pickles)}), which are not "
        "read; give the official checkpoint in the diffusers layout (a hub id that ends in -Diffusers) and, if you "
        f"wish, the transformer from here as transformer_file={folder / nets[0] if nets else folder}."
    )


def _expect(path: AnyPath, content: Mapping[str, Any], key: str, *wanted: str) -> None:
    got = content.get(key)
    if got not in (*wanted, *([one] for one in wanted)):
        raise UserError(
            f"{path} says {key}: {got!r}, and this command runs {wanted[0]}; use a checkpoint of that kind."
        )
