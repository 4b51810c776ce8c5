"""The files that a run writes: their names, draws, states, latents, videos, records and gallery."""

from maxdiffusion.output.cache_log import cache_records
from maxdiffusion.output.draws import drawn
from maxdiffusion.output.files import Output, Outputs
from maxdiffusion.output.gallery import Gallery
from maxdiffusion.output.manifest import remaining
from maxdiffusion.output.thresholds import Threshold

__all__ = ["Gallery", "Output", "Outputs", "Threshold", "cache_records", "drawn", "remaining"]
