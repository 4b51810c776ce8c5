"""WAN video diffusion models on XLA."""

__version__ = "0.2.0"
