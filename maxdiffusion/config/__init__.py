"""Parses a YAML file and key=value arguments to typed keys; imports neither jax nor numpy and opens no other file."""

from maxdiffusion.config.parse import parse
from maxdiffusion.config.schema import Config

__all__ = ["Config", "parse"]
