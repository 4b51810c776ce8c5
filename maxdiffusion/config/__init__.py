"""From a YAML file and key=value words to one frozen Config; imports neither jax nor numpy."""

from maxdiffusion.config.examples import Example, examples
from maxdiffusion.config.load import load
from maxdiffusion.config.schema import Config

__all__ = ["Config", "Example", "examples", "load"]
