"""The table of local kernels, the attention of one device between collectives. Imports no jax."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from maxdiffusion.attention.options import DEFAULT, LANES, SUBLANES, KernelOptions, check_multiple
from maxdiffusion.errors import UserError


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A local kernel.

    Attributes:
      name: name in a plan.
      function: "module:function", imported on use: a `dense.Local`, with the keyword `options` if it takes any.
      platforms: platforms that run it, of cpu, gpu and tpu.
      dtypes: dtypes of q, k and v that it takes; empty for every dtype.
      options: fields of `KernelOptions` that it takes.
      block_q_unit: number that block_q is a multiple of.
      package: optional package that it needs.
      eight_bits: whether it takes q and k as `eight_bits` rounds them.
      merges: whether it takes `other`, the result for other keys, and `whole`, whether that is the last merge.
      names: scheme -> value of the config's `attention` that selects scheme and kernel; by default the kernel's name
        for the scheme `local`.
    """

    name: str
    function: str
    platforms: tuple[str, ...]
    dtypes: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    block_q_unit: int = SUBLANES
    package: str | None = None
    eight_bits: bool = False
    merges: bool = False
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def runs_on(self, platform: str) -> bool:
        """Whether the platform runs it and its package is installed."""
        installed = self.package is None or importlib.util.find_spec(self.package) is not None
        return installed and platform in self.platforms

    def takes(self, dtype: str) -> bool:
        """Whether q, k and v may have that dtype."""
        return not self.dtypes or dtype in self.dtypes

    def check(self, options: KernelOptions) -> None:
        """Raises a UserError if an option is set that the kernel does not take, or has a size that does not suit it."""
        check_multiple("block_q", options.block_q, self.block_q_unit, f", which the attention kernel {self.name} needs")
        for option, value in dataclasses.asdict(options).items():
            if value is not None and option not in self.options:
                takers = ", ".join(kernel.name for kernel in KERNELS.values() if option in kernel.options)
                raise UserError(
                    f"{option}={value} is not used by the attention kernel {self.name}, which takes "
                    f"{', '.join(self.options) or 'no options'}; leave it out or choose a kernel that takes it "
                    f"({takers})."
                )

    def local(self, options: KernelOptions = DEFAULT) -> Callable[..., Any]:
        """Imports the function; returns it with the options bound, a `dense.Local`."""
        function = pkgutil.resolve_name(self.function)
        return functools.partial(function, options=options) if self.options else function


_HERE = "maxdiffusion.attention"
_EVERYWHERE = ("cpu", "gpu", "tpu")
_BLOCKS = ("block_q", "block_kv", "block_kv_compute")

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel("dot_product", f"{_HERE}.dense:dense", _EVERYWHERE),
        Kernel("chunked", f"{_HERE}.chunked:chunked", _EVERYWHERE),
        Kernel(
            "flash",
            f"{_HERE}.flash:flash",
            ("tpu",),
            options=(*_BLOCKS, "attention_vmem_limit_kib"),
            block_q_unit=LANES,
            eight_bits=True,
            merges=True,
        ),
        Kernel("splash", f"{_HERE}.splash:jax_splash", ("tpu",), options=_BLOCKS),
        Kernel(
            "tokamax_splash",
            f"{_HERE}.splash:tokamax_splash",
            ("tpu",),
            options=(*_BLOCKS, "use_base2_exp", "use_experimental_scheduler"),
            package="tokamax",
            names={"local": "tokamax_flash", "ring": "tokamax_ring"},
        ),
        Kernel("cudnn_flash", f"{_HERE}.cudnn:cudnn_flash", ("gpu",), dtypes=("bfloat16", "float16")),
    )
}
