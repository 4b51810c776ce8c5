"""WAN video diffusion models on XLA."""

__version__ = "0.1.0"
