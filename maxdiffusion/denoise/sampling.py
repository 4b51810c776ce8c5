"""From text embeddings to latents, batch by batch: the strategies that the config names, compiled once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Float

from maxdiffusion.conditioning.encode import Embeddings
from maxdiffusion.config import Config
from maxdiffusion.config.examples import Example, batches, examples
from maxdiffusion.denoise.experts import SingleExpert
from maxdiffusion.denoise.guidance import choose
from maxdiffusion.denoise.loop import Denoiser
from maxdiffusion.denoise.network import split
from maxdiffusion.denoise.noise import noise
from maxdiffusion.denoise.solvers import SOLVERS
from maxdiffusion.parallel import current
from maxdiffusion.runtime.stages import Stages
from maxdiffusion.weights.nets import Nets
