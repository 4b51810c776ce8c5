"""What the network is conditioned on, from the config's words and files."""

from __future__ import annotations

from maxdiffusion.conditioning.encode import Conditioning, encode

__all__ = ["Conditioning", "encode"]
