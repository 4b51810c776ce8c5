"""Attention modes: scheme x kernel. The plan is parsed before jax is imported, so the functions are imported on use."""

from typing import TYPE_CHECKING

from maxdiffusion.attention.plan import AttentionPlan

if TYPE_CHECKING:
    from maxdiffusion.attention.api import cross_attention, self_attention

__all__ = ["AttentionPlan", "cross_attention", "self_attention"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from maxdiffusion.attention import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
