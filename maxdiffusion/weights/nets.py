"""The networks of an opened checkpoint: all matched with their tensors, then loaded one at a time.

nets = Nets(open_checkpoint(folder), builders(plan, ...), placement)
text_encoder = nets.load("text_encoder"); ...; del text_encoder
transformer = nets.load("transformer")
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike
from threadpoolctl import threadpool_limits

from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.hardware.quantization import Quantization
from maxdiffusion.models.dit.transformer import WanTransformer
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.models.umt5.encoder import UMT5Encoder
from maxdiffusion.models.vae.model import WanVAE
from maxdiffusion.parallel import Placement
from maxdiffusion.weights import loader, mapping
from maxdiffusion.weights.checkpoint import NETS, Checkpoint

log = logging.getLogger(__name__)

GIB = 2**30

Build = Callable[[Any], nnx.Module]  # a network's config -> the abstract network: shapes in place of arrays


def builders(
    plan: AttentionPlan,
    *,
    weights_dtype: DTypeLike,
    dtype: DTypeLike,
    text_encoder_dtype: DTypeLike | None = None,
    vae_dtype: DTypeLike = "float32",
    scan_layers: bool = True,
    quantization: Quantization | None = None,
) -> dict[str, Build]:
    """How each network is built, by its folder.

    `text_encoder_dtype` (None: the transformer's dtypes), which is also that of image and audio encoders, and
    `vae_dtype` are the dtype of both weights and activations. `quantization` is that of the linear layers in the
    transformer's blocks.
    """
    dtypes = Dtypes(weights_dtype, dtype, quantization)
    encoders = Dtypes(text_encoder_dtype or weights_dtype, text_encoder_dtype or dtype)

    def transformer(config: Any) -> WanTransformer:
        return WanTransformer(config, plan, dtypes, scan_layers)

    def image_encoder(config: Any) -> nnx.Module:
        from maxdiffusion.models.clip.vision import CLIPVision  # which few variants have

        return CLIPVision(config, encoders, scan_layers)

    def audio_encoder(config: Any) -> nnx.Module:
        from maxdiffusion.models.wav2vec2.encoder import Wav2Vec2  # as above

        return Wav2Vec2(config, encoders, scan_layers)

    return {
        "text_encoder": lambda config: UMT5Encoder(config, encoders, scan_layers),
        "image_encoder": image_encoder,
        "audio_encoder": audio_encoder,
        "transformer": transformer,
        "transformer_2": transformer,
        "vae": lambda config: WanVAE(config, Dtypes(vae_dtype, vae_dtype)),
    }


def sizes(build: Mapping[str, Build], configs: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Number and bytes of the weights of each net, by folder."""
    return {name: size(build[name](config)) for name, config in configs.items()}


def size(net: nnx.Module) -> tuple[int, int]:
    """Number and bytes of a net's weights, loaded or abstract."""
    leaves = jax.tree.leaves(nnx.state(net))
    counts = [math.prod(leaf.shape) for leaf in leaves]
    return sum(counts), sum(count * leaf.dtype.itemsize for count, leaf in zip(counts, leaves, strict=True))


def matched(checkpoint: Checkpoint, name: str, build: Build) -> tuple[nnx.Module, mapping.Assignments]:
    """One network, abstract, and the tensors that fill it.

    Raises:
      UserError: weights and config do not fit; it counts the tensors and parameters concerned and names some.
    """
    spec, net = NETS[name], checkpoint.nets[name]
    abstract = build(net.config)
    what = str(net.path) if net.path == checkpoint.folder / name else f"{name}_file={net.path}"
    return abstract, mapping.match(net.tensors, spec.rules, abstract, what=what, ignored=spec.ignored)


def quantized(abstract: nnx.Module, assignments: mapping.Assignments) -> str:
    """What is in 8 bits of a matched network, for log and `inspect`; empty where nothing is.

    `400 linear layers in int8, 12 of them as the file stores them; 12.2 GiB in place of 24.4`.
    """
    params = mapping.parameters(abstract)
    kernels = {name: param for name, param in params.items() if f"{name}_scale" in params}
    if not kernels:
        return ""
    dtype = next(iter(kernels.values())).dtype.name
    sources = [each.tensor for name in kernels for each in assignments[name]]
    kept = sum(not source.computed for source in sources)
    before = after = 0
    for name, kernel in kernels.items():
        numbers, bias = math.prod(kernel.shape), params[name.removesuffix("kernel") + "bias"]
        before += numbers * bias.dtype.itemsize
        after += numbers + 4 * math.prod(params[f"{name}_scale"].shape)
    as_stored = f", {kept} of them as the file stores them" if kept else ""
    return f"{len(sources)} linear layers in {dtype}{as_stored}; {after / GIB:.3g} GiB in place of {before / GIB:.3g}"


class Nets:
    """Loads networks and keeps none: one that `load` returned and that was dropped is freed by the next `load`."""

    def __init__(self, checkpoint: Checkpoint, build: Mapping[str, Build], placement: Placement | None = None):
        """Builds every abstract network and matches its parameters with the checkpoint; reads no weight.

        Args:
          checkpoint: from `open_checkpoint`.
          build: for each folder of the checkpoint, config -> network.
          placement: the mesh for the parameters; None is jax's default device.

        Raises:
          UserError: weights and config do not fit; it counts the tensors and parameters concerned and names some.
        """
        self.checkpoint = checkpoint
        self._placement = placement
        self._nets = {name: matched(checkpoint, name, build[name]) for name in checkpoint.nets}

    def nbytes_on_disk(self, name: str) -> int:
        """How many bytes `load(name)` reads: the total of its progress."""
        return sum(each.tensor.nbytes for assigned in self._nets[name][1].values() for each in assigned)

    def load(self, name: str, on_tensor: Callable[[int], object] = lambda nbytes: None) -> nnx.Module:
        """Streams one network to its devices; `on_tensor` gets the number of bytes of each tensor once it is read."""
        # flax's flattened states are cyclic (0.12.8): a network that was dropped holds its arrays until a collection.
        gc.collect()
        abstract, assignments = self._nets[name]
        if said := quantized(abstract, assignments):
            log.info("%s: %s", name, said)
        # Tensors that are merged with a LoRA are computed side by side; BLAS' own threads would wait for each other,
        # spinning: 20 in place of 5 ns per weight on two busy cores.
        with threadpool_limits(1, "blas"):
            return loader.materialize(abstract, assignments, self._placement, on_tensor)
