"""The attention plan, parsed once from the config. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from maxdiffusion.attention.kernels import KERNELS
from maxdiffusion.attention.options import DEFAULT, KernelOptions
from maxdiffusion.errors import UserError

SCHEMES = ("local", "ring", "ulysses", "ulysses_ring")
RING_DIRECTIONS = ("one_way", "two_way")
QUANTIZATIONS = ("none", "fp8")


def names() -> dict[str, tuple[str, str | None]]:
    """Value of the config's `attention` -> (scheme, kernel); None is the platform's fastest exact kernel."""
    found: dict[str, tuple[str, str | None]] = {}
    for scheme in SCHEMES:
        if scheme != "local":
            found[scheme] = scheme, None
        for kernel in KERNELS.values():
            if name := (kernel.names or {"local": kernel.name}).get(scheme):
                found[name] = scheme, kernel.name
    return found


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """Scheme, local kernel and degrees of attention, checked by the constructor.

    Attributes:
      scheme: how self-attention is split over the context axis. `local` gathers keys and values and splits queries
        only; `ring` rotates keys and values (Liu et al., arXiv 2310.01889); `ulysses` trades sequence for heads by
        all-to-all (Jacobs et al., arXiv 2309.14509); `ulysses_ring` does both (Fang and Zhao, arXiv 2405.07719).
      kernel: key of `KERNELS`.
      ring: devices around which keys and values rotate; ring x ulysses is the context degree.
      ulysses: devices that trade sequence for heads.
      heads: attention heads of the model; None skips the checks that need it.
      tensor: tensor-parallel devices, which split the heads too.
      options: settings of the kernel.
      chunks: head groups whose all-to-all and attention overlap.
      ring_direction: `one_way`, or `two_way`: halves of keys and values rotate in opposite directions.
      quantization: of q and k of self-attention, `none` or `fp8`, see `eight_bits`.

    Raises:
      UserError: the degrees do not divide the heads or contradict the scheme, or the scheme or the kernel does not take
        an option.
    """

    scheme: str = "local"
    kernel: str = "dot_product"
    ring: int = 1
    ulysses: int = 1
    heads: int | None = None
    tensor: int = 1
    options: KernelOptions = DEFAULT
    chunks: int = 1
    ring_direction: str = "one_way"
    quantization: str = "none"

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise UserError(f"The attention scheme {self.scheme!r} is unknown; choose one of {', '.join(SCHEMES)}.")
        if self.kernel not in KERNELS:
            raise UserError(f"The attention kernel {self.kernel!r} is unknown; choose one of {', '.join(KERNELS)}.")
        KERNELS[self.kernel].check(self.options)
        for name in ("ring", "ulysses", "tensor", "chunks"):
            if getattr(self, name) < 1:
                raise UserError(f"The attention plan has {name}={getattr(self, name)}; it must be 1 or more.")
        if self.scheme in ("local", "ulysses") and self.ring > 1:
            raise UserError(f"Attention {self.scheme!r} has no ring, but the ring degree is {self.ring}; it must be 1.")
        if self.scheme in ("local", "ring") and self.ulysses > 1:
            raise UserError(
                f"Attention {self.scheme!r} has no all-to-all, but ulysses_shards is {self.ulysses}; it must be 1 "
                "(or choose ulysses_ring)."
            )
        if self.chunks > 1 and self.ulysses == 1:
            raise UserError(
                f"ulysses_attention_chunks={self.chunks} overlaps all-to-alls, but there is none with "
                f"ulysses_shards=1; write ulysses_attention_chunks=1 or choose a larger ulysses_shards."
            )
        if self.quantization not in QUANTIZATIONS:
            choices = " or ".join(QUANTIZATIONS)
            raise UserError(f"attention_quantization={self.quantization} is unknown; choose {choices}.")
        if self.ring_direction not in RING_DIRECTIONS:
            raise UserError(f"ring_direction={self.ring_direction} is unknown; choose {' or '.join(RING_DIRECTIONS)}.")
        if self.ring_direction == "two_way" and self.ring == 1:
            raise UserError(
                "ring_direction=two_way has no ring to go around: the ring degree is 1; write ring_direction=one_way "
                "or choose a smaller ulysses_shards."
            )
        if self.heads is None:
            return
        if self.heads % self.tensor:
            raise UserError(
                f"{self.heads} attention heads cannot be split over {self.tensor} tensor-parallel devices; choose "
                f"{_choices(_divisors(self.heads))}."
            )
        heads = self.heads // self.tensor
        if heads % self.ulysses:
            legal = _choices(legal_ulysses(self.heads, self.ring * self.ulysses, self.tensor))
            over = f" over {self.tensor} tensor-parallel devices" if self.tensor > 1 else ""
            how = ", with attention=ulysses_ring" if self.scheme == "ulysses" else ""
            raise UserError(
                f"ulysses_shards={self.ulysses} cannot split {self.heads} heads{over}; choose {legal}{how}."
            )
        if heads // self.ulysses % self.chunks:
            raise UserError(
                f"ulysses_attention_chunks={self.chunks} cannot split the {heads // self.ulysses} heads that each of "
                f"{self.ulysses} ulysses_shards holds; choose {_choices(_divisors(heads // self.ulysses))}."
            )

    @property
    def context(self) -> int:
        """Devices that share the tokens."""
        return self.ring * self.ulysses

    @classmethod
    def parse(cls, name: str, **given: Any) -> AttentionPlan:
        """Selects the plan with the largest Ulysses degree from `plans(name, **given)`.

        Raises:
          UserError: as `plans`, or no split is legal.
        """
        found, refused = plans(name, **given)
        if not found:
            raise refused[max(refused)]
        return found[max(found)]


def plans(
    name: str,
    *,
    heads: int,
    context: int = 1,
    slices: int = 1,
    ulysses_shards: int | None = None,
    platform: str = "cpu",
    dtype: str = "float32",
    tensor: int = 1,
    options: KernelOptions = DEFAULT,
    chunks: int = 1,
    ring_direction: str = "one_way",
    quantization: str = "none",
) -> tuple[dict[int, AttentionPlan], dict[int, UserError]]:
    """All legal plans for a config's `attention` and `ulysses_shards` on the given devices.

    `auto` and `ulysses_ring` leave the split open unless `ulysses_shards` is given; any other name has one split.
    `auto` and the names of a scheme alone take the platform's best kernel. A named kernel is never replaced by another.

    Args:
      name: `auto` or a key of `names()`.
      heads: attention heads of the model.
      context: devices of the context axis.
      slices: slices that the context axis spans; Ulysses stays within one.
      ulysses_shards: context devices that trade sequence for heads; None or -1 leaves it open.
      platform: jax's name of the platform: cpu, gpu or tpu.
      dtype: dtype of q, k and v.
      tensor: tensor-parallel devices, which split the heads too.
      options: settings of the kernel.
      chunks: head groups whose all-to-all and attention overlap.
      ring_direction: one of `RING_DIRECTIONS`.
      quantization: one of `QUANTIZATIONS`.

    Returns:
      Ulysses degree -> plan of every legal split, and Ulysses degree -> error of every illegal one.

    Raises:
      UserError: an unknown name, a kernel that the platform lacks or that does not take the dtype or an option, or
        degrees that do not divide.
    """
    known = {"auto": ("auto", None), **names()}
    if name not in known:
        raise UserError(f"attention={name} is unknown; choose one of {', '.join(known)}.")
    scheme, named = known[name]
    kernel = named or best_kernel(platform, dtype)
    row = KERNELS[kernel]
    if not row.runs_on(platform):
        runs = [n for n, (_, k) in names().items() if k is None or KERNELS[k].runs_on(platform)]
        raise UserError(
            f"attention={name} needs a kernel that this installation lacks on {platform}; choose auto or one of "
            f"{', '.join(runs)}."
        )
    if not row.takes(dtype):
        raise UserError(
            f"attention={name} computes in {' or '.join(row.dtypes)}, not {dtype}; write "
            f"activations_dtype={row.dtypes[0]} or attention=auto."
        )
    asked = None if ulysses_shards in (None, -1) else ulysses_shards
    if asked is not None and (asked < 1 or context % asked):
        raise UserError(
            f"ulysses_shards={asked} does not divide the {context} device(s) of the context axis; choose "
            f"{_choices(legal_ulysses(heads, context, tensor))}, or auto to let it be chosen."
        )
    if scheme == "ulysses" and asked not in (None, context):
        raise UserError(
            f"attention=ulysses uses all {context} devices of the context axis for ulysses_shards, not "
            f"{asked}; write ulysses_shards={context} or attention=ulysses_ring."
        )
    degrees = [asked or (context if scheme == "ulysses" else 1)]
    if scheme in ("auto", "ulysses_ring") and asked is None:
        degrees = _divisors(context // slices)
    found: dict[int, AttentionPlan] = {}
    refused: dict[int, UserError] = {}
    for ulysses in degrees:
        ring = 1 if scheme == "local" else context // ulysses
        each = _scheme(ring, ulysses) if scheme == "auto" or context == 1 else scheme
        try:
            degrees_of = (each, kernel, ring, ulysses, heads, tensor)
            found[ulysses] = AttentionPlan(*degrees_of, options, chunks, ring_direction, quantization)
        except UserError as error:
            refused[ulysses] = error
    return found, refused


def best_kernel(platform: str, dtype: str = "float32") -> str:
    """Name of the fastest exact local kernel of a platform for a dtype.

    Raises:
      UserError: an unknown platform.
    """
    for name in ("flash", "cudnn_flash", "chunked"):
        if KERNELS[name].runs_on(platform) and KERNELS[name].takes(dtype):
            return name
    raise UserError(f"No attention kernel runs on the platform {platform!r}; choose cpu, gpu or tpu.")


def legal_ulysses(heads: int, context: int, tensor: int = 1) -> list[int]:
    """The Ulysses degrees that divide both the context devices and the heads of one tensor shard, ascending."""
    return _divisors(math.gcd(context, max(heads // tensor, 1)))


def _scheme(ring: int, ulysses: int) -> str:
    if ring == 1:
        return "local" if ulysses == 1 else "ulysses"
    return "ring" if ulysses == 1 else "ulysses_ring"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _choices(values: list[int]) -> str:
    return " or ".join(map(str, values))
