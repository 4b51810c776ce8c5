"""Our UMT5 encoder with the weights of transformers' one."""

import jax.numpy as jnp

from maxdiffusion.models.layers import Dtypes
from maxdiffusion.models.umt5.config import UMT5Config
from maxdiffusion.models.umt5.encoder import UMT5Encoder
from maxdiffusion.weights.tables.umt5 import RULES
from tests.support.parity import load_state_dict


def encoder_of(reference, dtype=jnp.float32, scan_layers=True):
    config = UMT5Config.from_json(reference.config.to_dict())
    encoder = UMT5Encoder(config, Dtypes(dtype, dtype), scan_layers=scan_layers)
    return load_state_dict(encoder, RULES, reference.state_dict())
