"""What the network is conditioned on, from a run's words and files."""

from maxdiffusion.conditioning.encode import Conditioning, Inputs, encode, read, shapes

__all__ = ["Conditioning", "Inputs", "encode", "read", "shapes"]
