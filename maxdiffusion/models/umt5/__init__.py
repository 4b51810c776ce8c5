"""The UMT5 text encoder. `config` is importable without jax, so the network itself comes on first use."""

from typing import TYPE_CHECKING, Any

from maxdiffusion.models.umt5.config import UMT5Config

if TYPE_CHECKING:
    from maxdiffusion.models.umt5.encoder import UMT5Encoder

__all__ = ["UMT5Config", "UMT5Encoder"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from maxdiffusion.models.umt5 import encoder

    return getattr(encoder, name)
