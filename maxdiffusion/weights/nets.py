"""The nets of an opened pipeline: matched with their tensors as a whole, then loaded one at a time.

pipeline = specs.open_pipeline(folder)
nets = Nets(pipeline, builders(plan, ...), placement)
text_encoder = nets.load("text_encoder"); ...; del text_encoder
transformer = nets.load("transformer")
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from maxdiffusion.attention import AttentionPlan
from maxdiffusion.models.clip.vision import CLIPVision
from maxdiffusion.models.dit.transformer import WanTransformer
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.models.umt5.encoder import UMT5Encoder
from maxdiffusion.models.vae.model import WanVAE
from maxdiffusion.parallel import Placement
from maxdiffusion.weights import loader, mapping
from maxdiffusion.weights.specs import Pipeline

Build = Callable[[Any], nnx.Module]  # the net's config -> the abstract net: shapes in place of arrays


def builders(
    plan: AttentionPlan,
    *,
    weights_dtype: DTypeLike,
    dtype: DTypeLike,
    text_encoder_dtype: DTypeLike | None = None,
    vae_dtype: DTypeLike = "float32",
    scan_layers: bool = True,
) -> dict[str, Build]:
    """How the nets of a pipeline are built.

    `text_encoder_dtype` (None: those of the transformer), which the image encoder shares, and `vae_dtype` hold for
    weights and activations alike.
    """
    dtypes = Dtypes(weights_dtype, dtype)
    encoders = Dtypes(text_encoder_dtype or weights_dtype, text_encoder_dtype or dtype)

    def transformer(config: Any) -> WanTransformer:
        return WanTransformer(config, plan, dtypes, scan_layers)

    return {
        "text_encoder": lambda config: UMT5Encoder(config, encoders, scan_layers),
        "image_encoder": lambda config: CLIPVision(config, encoders, scan_layers),
        "transformer": transformer,
        "transformer_2": transformer,
        "vae": lambda config: WanVAE(config, Dtypes(vae_dtype, vae_dtype)),
    }


def matched(pipeline: Pipeline, name: str, build: Build) -> tuple[nnx.Module, mapping.Assignments]:
    """One net, abstract, and the tensors that fill it.

    Raises:
      UserError: weights and config do not fit; it names every tensor and parameter concerned.
    """
    abstract, spec, what = build(pipeline.configs[name]), pipeline.specs[name], pipeline.files.paths
    assignments = mapping.match(
        pipeline.tensors[name], spec.rules, abstract, what=str(what[name]), ignored=spec.ignored
    )
    return abstract, assignments


class Nets:
    """Nothing loaded is kept here: a module that `load` returned and that was dropped is freed by the next `load`."""

    def __init__(self, pipeline: Pipeline, build: Mapping[str, Build], placement: Placement | None = None):
        """Builds every net without numbers and matches its parameters with the checkpoint; reads no weight.

        Args:
          pipeline: from `open_pipeline`.
          build: for each folder of the pipeline, its config -> the net.
          placement: where the parameters will live; None is jax's default device.

        Raises:
          UserError: weights and config do not fit; it names every tensor and parameter concerned.
        """
        self.files = pipeline.files
        self.folder = pipeline.files.folder
        self.configs = pipeline.configs
        self._placement = placement
        self._nets: dict[str, tuple[nnx.Module, mapping.Assignments]] = {}
        for name in pipeline.specs:
            self._nets[name] = matched(pipeline, name, build[name])

    def nbytes_on_disk(self, name: str) -> int:
        """How many bytes `load(name)` reads: the total of its progress."""
        return sum(each.tensor.nbytes for assigned in self._nets[name][1].values() for each in assigned)

    def load(self, name: str, on_tensor: Callable[[int], object] = lambda nbytes: None) -> nnx.Module:
        """Streams one net to its devices; `on_tensor` gets the number of bytes of each tensor once it is read."""
        # flax's flattened states are cyclic (0.12.8): a net that was dropped holds its arrays until a collection.
        gc.collect()
        abstract, assignments = self._nets[name]
        return loader.materialize(abstract, assignments, self._placement, on_tensor)
