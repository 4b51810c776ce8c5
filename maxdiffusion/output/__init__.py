"""The files that a run writes: their names, latents, videos and records."""

from maxdiffusion.output.files import Output, reserved
from maxdiffusion.output.manifest import remaining

__all__ = ["Output", "remaining", "reserved"]
