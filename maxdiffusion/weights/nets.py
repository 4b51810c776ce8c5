"""The nets of a pipeline: their checks before any weight is read, and their loading one at a time.

pipeline = open_pipeline(folder, TEXT_TO_VIDEO)             # JSON and headers only; no jax
nets = Nets(pipeline, options)                              # every tensor has its parameter, or an error says which
text_encoder = nets.load("text_encoder"); ...; del text_encoder
transformer = nets.load("transformer")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maxdiffusion.weights import checkpoint
from maxdiffusion.weights.rule import Rule

if TYPE_CHECKING:
    from flax import nnx

    from maxdiffusion.parallel import Placement


@dataclasses.dataclass(frozen=True)
class NetSpec:
    """One net of a pipeline: where it lies, how its config is parsed, how it is built and named."""

    folder: str
    class_name: str  # in its config.json
    parse: Callable[[dict[str, Any]], Any]  # config.json -> the net's own config; raises UserError; free of jax
    build: Callable[[Any, Any], nnx.Module]  # (config, options) -> the net; called under nnx.eval_shape
    rules: Sequence[Rule]
    ignored: Sequence[str] = ()  # regular expressions of tensors that the net knowingly does not use


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """An opened checkpoint whose configs are understood; no weight was read."""

    specs: Mapping[str, NetSpec]
    files: checkpoint.Checkpoint
    configs: Mapping[str, Any]  # folder -> the net's own config


def open_pipeline(folder: Path, specs: Sequence[NetSpec]) -> Pipeline:
    """Opens a local folder without importing jax; anything wrong with its files, classes or configs is a UserError."""
    files = checkpoint.open_checkpoint(folder, {spec.folder: spec.class_name for spec in specs})
    configs = {spec.folder: spec.parse(files.configs[spec.folder]) for spec in specs}
    return Pipeline({spec.folder: spec for spec in specs}, files, configs)


class Nets:
    """The nets of an opened pipeline, verified as a whole, then loaded one by one.

    Nothing loaded is kept here: dropping the module that `load` returned frees its memory.
    """

    def __init__(self, pipeline: Pipeline, options: Any, placement: Placement | None = None):
        """Builds every net abstractly and matches its parameters with the checkpoint.

        Args:
          pipeline: from `open_pipeline`.
          options: handed to each `NetSpec.build`: dtypes, attention plan, scan.
          placement: where the parameters will live; None is jax's default device.

        Raises:
          UserError: weights and config do not fit, with every tensor and parameter concerned.
        """
        from flax import nnx  # jax comes in here, once the files are known to be sound

        from maxdiffusion.weights import mapping

        self._placement = placement
        self._nets = {}
        for name, spec in pipeline.specs.items():
            with nnx.use_eager_sharding(False):
                module = nnx.eval_shape(lambda spec=spec, name=name: spec.build(pipeline.configs[name], options))
            folder = pipeline.files.folder / name
            tensors = pipeline.files.tensors[name]
            pieces = mapping.match(tensors, spec.rules, module, what=str(folder), ignored=spec.ignored)
            self._nets[name] = (module, pieces)

    def nbytes_on_disk(self, name: str) -> int:
        """How many bytes `load(name)` reads, the total of its progress."""
        return sum(piece.tensor.nbytes for pieces in self._nets[name][1].values() for piece in pieces)

    def abstract(self, name: str) -> nnx.Module:
        """The net with shapes in place of weights, to plan or compile with before it is loaded."""
        return self._nets[name][0]

    def load(self, name: str, on_tensor: Callable[[int], object] = lambda nbytes: None) -> nnx.Module:
        """Streams the weights of one net to its devices; `on_tensor` gets the bytes of each tensor once it is read."""
        from maxdiffusion.weights import loader

        module, pieces = self._nets[name]
        return loader.materialize(module, pieces, self._placement, on_tensor)
