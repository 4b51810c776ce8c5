"""What the network is conditioned on, from the config's words."""

from __future__ import annotations

from maxdiffusion.conditioning.encode import Embeddings, encode

__all__ = ["Embeddings", "encode"]
