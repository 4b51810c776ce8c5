"""Resolves values to a checked run, and sets up its files, mesh and networks."""

from maxdiffusion.request.job import Job
from maxdiffusion.request.resolve import job_of, load, on_mesh, resolve, with_keys, with_words
from maxdiffusion.request.segments import Segments
from maxdiffusion.request.videos import Video

__all__ = ["Job", "Segments", "Video", "job_of", "load", "on_mesh", "resolve", "with_keys", "with_words"]
