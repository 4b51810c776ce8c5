"""What the network is conditioned on, from the config's words and files."""

from __future__ import annotations

from maxdiffusion.conditioning.described import Described
from maxdiffusion.conditioning.encode import PERFORMANCE, START, Conditioning, Inputs, describe, encode, read

__all__ = ["PERFORMANCE", "START", "Conditioning", "Described", "Inputs", "describe", "encode", "read"]
