"""Conditioning of the network, from a run's prompts and files."""

from maxdiffusion.conditioning.encode import Conditioning, Inputs, decoding, encode, read, shapes

__all__ = ["Conditioning", "Inputs", "decoding", "encode", "read", "shapes"]
