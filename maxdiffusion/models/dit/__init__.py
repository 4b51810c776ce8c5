"""The WAN video transformer. `config` is importable without jax, so the network itself comes on first use."""

from typing import TYPE_CHECKING, Any

from maxdiffusion.models.dit.config import DiTConfig

if TYPE_CHECKING:
    from maxdiffusion.models.dit.context import Context, Frames, PreparedContext
    from maxdiffusion.models.dit.transformer import WanTransformer

__all__ = ["Context", "DiTConfig", "Frames", "PreparedContext", "WanTransformer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from maxdiffusion.models.dit import context, transformer

    return getattr(transformer if name == "WanTransformer" else context, name)
