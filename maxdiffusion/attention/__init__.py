"""Attention modes: scheme x kernel x options."""

from maxdiffusion.attention.api import cross_attention, self_attention
from maxdiffusion.attention.plan import AttentionPlan

__all__ = ["AttentionPlan", "cross_attention", "self_attention"]
