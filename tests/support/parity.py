"""Fills one of our modules from a torch state dict through its name table. Independent of the real loader."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.torch
import torch
from flax import nnx

from maxdiffusion import parallel
from maxdiffusion.weights import net_file
from maxdiffusion.weights.loader import placed
from maxdiffusion.weights.rule import Rule


def match(rules: Sequence[Rule], name: str) -> tuple[Rule, str, int | None]:
    """The rule that names `name`, the path of our parameter, and the slot on its layer axis (None: not stacked)."""
    for rule in rules:
        for source in (rule.source, *rule.aliases):
            found = re.fullmatch(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(source)), name)
            if found:
                numbers = {key: int(value) for key, value in found.groupdict().items()}
                return rule, rule.target.format(**numbers), numbers.get("layer")
    raise KeyError(f"no rule for {name}")


def paths(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Dotted path -> parameter, for every parameter of a loaded or described module."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def load_state_dict(module: nnx.Module, rules: Sequence[Rule], state_dict: Mapping) -> nnx.Module:
    """Returns `module`, as it was built, with every parameter set. Strict both ways.

    Raises:
      KeyError: a tensor without a rule, a parameter or a slot of one without a tensor.
      ValueError: a shape that does not fit.
    """
    params = paths(module)
    slots: dict[str, dict[int | None, np.ndarray]] = {}
    for name, tensor in state_dict.items():
        rule, path, layer = match(rules, name)
        array = tensor.detach().float().numpy()
        if rule.transform.value is not None:
            array = array.transpose(rule.transform.value)
        shape = params[path].shape if layer is None else params[path].shape[1:]
        if rule.reshape:
            array = array.reshape(shape)
        if array.shape != shape:
            raise ValueError(f"{name} {array.shape} does not fit {path} {shape}")
        slots.setdefault(path, {})[layer] = array
    if missing := sorted(params.keys() - slots.keys()):
        raise KeyError(f"no tensor for {missing}")
    for path, arrays in slots.items():
        param = params[path]
        if None in arrays:
            value = arrays[None]
        else:
            if sorted(arrays) != list(range(param.shape[0])):
                raise KeyError(f"{path} has slots {sorted(arrays)} of {param.shape[0]}")
            value = np.stack([arrays[layer] for layer in range(param.shape[0])])
        params[path] = param.replace(jnp.asarray(value, param.dtype))
    flat = [(path, params[".".join(map(str, path))]) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))]
    nnx.update(module, nnx.from_flat_state(flat))
    return module


def drawn(module: nnx.Module, seed: int = 0) -> nnx.Module:
    """A copy of `module`, as it was built, with numbers for every parameter; activations stay of order one."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        scale = math.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.1
        return jnp.asarray((leaf.ndim == 1) + scale * rng.standard_normal(leaf.shape), leaf.dtype)

    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(draw, state))


def by_table(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a reference transformer's file by the names of the table, in which it is read."""
    stored = module.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        safetensors.torch.save_file(stored, path)
        found, _ = net_file.read(path, "transformer")
    return {name: stored[source.name] for name, source in found.items()}


def drawn_on_devices(module: nnx.Module, seed: int = 0) -> nnx.Module:
    """`drawn`, with the parameters sharded as the current placement has them, if there is one."""
    filled = drawn(module, seed)
    if (placement := parallel.current()) is None:
        return filled
    shardings = jax.tree.map(lambda leaf: leaf.sharding, nnx.state(placed(module, placement)))
    graph, params = nnx.split(filled)
    return nnx.merge(graph, jax.device_put(params, shardings))


def relative_error(ours, reference) -> float:
    """Largest absolute error over the largest absolute reference value."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
