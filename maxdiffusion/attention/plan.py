"""The frozen description of how attention runs, parsed once from the config; imports no jax."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
from collections.abc import Mapping
from types import MappingProxyType

from maxdiffusion.attention.options import DEFAULT, KernelOptions
from maxdiffusion.errors import UserError

log = logging.getLogger(__name__)

SCHEMES = ("local", "ring", "ulysses", "ulysses_ring")

# Local kernel -> the platforms that run it. A kernel that is added here is also added to `kernels.KERNELS`
# and `options.TAKEN`.
PLATFORMS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "dot_product": frozenset({"cpu", "gpu", "tpu"}),
        "chunked": frozenset({"cpu", "gpu", "tpu"}),
        "splash": frozenset({"tpu"}),
        "tokamax_splash": frozenset({"tpu"}),
    }
)

# What users write -> (scheme, kernel); the kernel None is the fastest exact one that the platform has.
NAMES: Mapping[str, tuple[str, str | None]] = MappingProxyType(
    {
        "dot_product": ("local", "dot_product"),
        "chunked": ("local", "chunked"),
        "flash": ("local", "splash"),
        "tokamax_flash": ("local", "tokamax_splash"),
        "ring": ("ring", None),
        "tokamax_ring": ("ring", "tokamax_splash"),
        "ulysses": ("ulysses", None),
        "ulysses_ring": ("ulysses_ring", None),
    }
)


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """scheme x local kernel x degrees, checked when it is made.

    Attributes:
      scheme: how self-attention is split over the context axis. `local` gathers keys and values and splits queries
        only; `ring` rotates keys and values (Liu et al., arXiv 2310.01889); `ulysses` trades sequence for heads by
        all-to-all (Jacobs et al., arXiv 2309.14509); `ulysses_ring` does both (Fang and Zhao, arXiv 2405.07719).
      kernel: what one device computes, a key of `PLATFORMS`.
      ring: devices around which keys and values rotate; times `ulysses` it is the context degree.
      ulysses: devices that trade sequence for heads.
      heads: attention heads of the model; None (models built alone) skips the checks that need it.
      tensor: devices over which heads are split besides.
      options: what is set of the kernel.

    Raises:
      UserError: the degrees do not divide the heads or contradict the scheme, or the kernel does not take an option.
    """

    scheme: str = "local"
    kernel: str = "dot_product"
    ring: int = 1
    ulysses: int = 1
    heads: int | None = None
    tensor: int = 1
    options: KernelOptions = DEFAULT

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise UserError(f"The attention scheme {self.scheme!r} is unknown; choose one of {', '.join(SCHEMES)}.")
        if self.kernel not in PLATFORMS:
            raise UserError(f"The attention kernel {self.kernel!r} is unknown; choose one of {', '.join(PLATFORMS)}.")
        self.options.check(self.kernel)
        for name in ("ring", "ulysses", "tensor"):
            if getattr(self, name) < 1:
                raise UserError(f"The {name} degree of attention is {getattr(self, name)}; it must be 1 or more.")
        if self.scheme in ("local", "ulysses") and self.ring > 1:
            raise UserError(f"Attention {self.scheme!r} has no ring, but the ring degree is {self.ring}; it must be 1.")
        if self.scheme in ("local", "ring") and self.ulysses > 1:
            raise UserError(
                f"Attention {self.scheme!r} has no all-to-all, but ulysses_shards is {self.ulysses}; it must be 1 "
                "(or choose ulysses_ring)."
            )
        if self.heads is None:
            return
        if self.heads % self.tensor:
            raise UserError(
                f"{self.heads} attention heads cannot be split over {self.tensor} tensor-parallel devices; choose "
                f"{_choices(_divisors(self.heads))}."
            )
        if (self.heads // self.tensor) % self.ulysses:
            raise UserError(
                f"ulysses_shards={self.ulysses} cannot split {_heads(self.heads, self.tensor)}; choose "
                f"{_choices(legal_ulysses(self.heads, self.ring * self.ulysses, self.tensor))}."
            )

    @property
    def context(self) -> int:
        """Devices that share the tokens."""
        return self.ring * self.ulysses

    @classmethod
    def parse(
        cls,
        name: str,
        *,
        heads: int,
        context: int = 1,
        ulysses_shards: int | None = None,
        platform: str = "cpu",
        tensor: int = 1,
        options: KernelOptions = DEFAULT,
    ) -> AttentionPlan:
        """The plan that a config's `attention` and `ulysses_shards` mean on given devices.

        Only `auto` chooses (and logs why); a named choice is what runs, or this raises.

        Args:
          name: `auto` or a key of `NAMES`.
          heads: attention heads of the model.
          context: devices that share the tokens.
          ulysses_shards: how many of them trade sequence for heads; None or -1 takes the largest legal number.
          platform: what jax calls the devices: cpu, gpu or tpu.
          tensor: devices over which heads are split besides.
          options: what is set of the kernel.

        Raises:
          UserError: an unknown name, a kernel that the platform lacks, an option that it does not take, or degrees
            that do not divide.
        """
        if name != "auto" and name not in NAMES:
            raise UserError(f"attention={name} is unknown; choose one of auto, {', '.join(NAMES)}.")
        scheme, kernel = NAMES.get(name, ("auto", None))
        kernel = kernel or best_kernel(platform)
        if not _available(kernel, platform):
            runs = [n for n, (_, k) in NAMES.items() if k is None or _available(k, platform)]
            raise UserError(
                f"attention={name} needs a kernel that this installation lacks on {platform}; choose auto or one of "
                f"{', '.join(runs)}."
            )
        asked = None if ulysses_shards in (None, -1) else ulysses_shards
        if asked is not None and (asked < 1 or context % asked):
            raise UserError(
                f"ulysses_shards={asked} does not divide the {context} device(s) of the context axis; choose "
                f"{_choices(legal_ulysses(heads, context, tensor))}, or -1 to let it be chosen."
            )
        legal = legal_ulysses(heads, context, tensor)
        if scheme == "auto":
            ulysses = asked or legal[-1]
            scheme = _scheme(context // ulysses, ulysses)
            _log_choice(kernel, platform, heads, context, tensor, ulysses, asked is not None)
        elif scheme == "ulysses":
            ulysses = asked or context
            if ulysses != context:
                raise UserError(
                    f"attention=ulysses uses all {context} devices of the context axis for ulysses_shards, not "
                    f"{asked}; write ulysses_shards={context} or attention=ulysses_ring."
                )
            if context not in legal:
                raise UserError(
                    f"attention=ulysses on {context} context devices cannot split {_heads(heads, tensor)}; write "
                    f"attention=ulysses_ring with ulysses_shards {_choices(legal)}, or a context of "
                    f"{_choices(_divisors(heads // math.gcd(heads, tensor)))}."
                )
        elif scheme == "ulysses_ring":
            ulysses = asked or legal[-1]
            if asked is None and context > 1:
                log.info("ulysses_shards=%d: the largest that divides %s.", ulysses, _heads(heads, tensor))
        else:
            ulysses = asked or 1
        if context == 1 or scheme == "local":
            return cls("local", kernel, 1, ulysses, heads, tensor, options)
        return cls(scheme, kernel, context // ulysses, ulysses, heads, tensor, options)


def best_kernel(platform: str) -> str:
    """The fastest exact local kernel of a platform."""
    for kernel in ("tokamax_splash", "splash", "chunked"):
        if _available(kernel, platform):
            return kernel
    raise UserError(f"No attention kernel runs on the platform {platform!r}; choose cpu, gpu or tpu.")


def legal_ulysses(heads: int, context: int, tensor: int = 1) -> list[int]:
    """The Ulysses degrees that divide both the context devices and the heads of one tensor shard, ascending."""
    return _divisors(math.gcd(context, max(heads // tensor, 1)))


def _available(kernel: str, platform: str) -> bool:
    installed = kernel != "tokamax_splash" or importlib.util.find_spec("tokamax") is not None
    return installed and platform in PLATFORMS[kernel]


def _scheme(ring: int, ulysses: int) -> str:
    if ring == 1:
        return "local" if ulysses == 1 else "ulysses"
    return "ring" if ulysses == 1 else "ulysses_ring"


def _log_choice(kernel: str, platform: str, heads: int, context: int, tensor: int, ulysses: int, asked: bool) -> None:
    ring = context // ulysses
    why = "asked for" if asked else f"the largest all-to-all that divides {_heads(heads, tensor)}, the rest in a ring"
    split = f"{_scheme(ring, ulysses)} with ring {ring} x ulysses {ulysses} ({why})" if context > 1 else "one device"
    log.info("attention=auto: kernel %s, the fastest exact one on %s; %s.", kernel, platform, split)


def _heads(heads: int, tensor: int) -> str:
    return f"{heads} heads" + (f" over {tensor} tensor-parallel devices" if tensor > 1 else "")


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _choices(values: list[int]) -> str:
    return " or ".join(map(str, values))
