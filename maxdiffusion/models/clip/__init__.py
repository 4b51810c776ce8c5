"""The CLIP vision tower. `config` is importable without jax, so the network itself comes on first use."""

from typing import TYPE_CHECKING, Any

from maxdiffusion.models.clip.config import CLIPVisionConfig

if TYPE_CHECKING:
    from maxdiffusion.models.clip.vision import CLIPVision

__all__ = ["CLIPVision", "CLIPVisionConfig"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from maxdiffusion.models.clip import vision

    return getattr(vision, name)
