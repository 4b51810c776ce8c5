"""What the network is conditioned on, from the config's words and files."""

from __future__ import annotations

from maxdiffusion.conditioning.encode import START, Conditioning, Inputs, encode, read

__all__ = ["START", "Conditioning", "Inputs", "encode", "read"]
