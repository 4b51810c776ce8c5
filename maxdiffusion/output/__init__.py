"""The files that a run writes: their names, draws, states, latents, videos and records."""

from maxdiffusion.output.draws import drawn
from maxdiffusion.output.files import Output, Outputs
from maxdiffusion.output.manifest import remaining

__all__ = ["Output", "Outputs", "drawn", "remaining"]
