"""Encodes a video of a face as tokens of its motion: an encoder of single frames, then causal convolutions over time.

Reference: `WanAnimateMotionEncoder` and `WanAnimateFaceEncoder` in diffusers' transformer_wan_animate.py; the former is
that of LIA (Wang et al., 2022, arXiv:2203.09043), on the convolutions of StyleGAN2 (Karras et al., 2020).
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from maxdiffusion.models.dit.config import AnimateConfig
from maxdiffusion.models.layers import Dtypes, Linear, layer_norm, parameter
from maxdiffusion.parallel import axes


def _scaled_leaky_relu(x: jax.Array) -> jax.Array:
    return jax.nn.leaky_relu(x, 0.2) * math.sqrt(2)


def _blur(x: Float[Array, "b h w c"], padding: int) -> Float[Array, "b h2 w2 c"]:
    """The binomial filter (1, 3, 3, 1) / 8 along height and along width, zeros outside."""
    for axis in (1, 2):
        x = jnp.pad(x, [(padding, padding) if n == axis else (0, 0) for n in range(4)])
        taps = [jax.lax.slice_in_dim(x, i, i + x.shape[axis] - 3, axis=axis) for i in range(4)]
        x = (taps[0] + 3 * (taps[1] + taps[2]) + taps[3]) / 8
    return x


class ScaledConv2d(nnx.Module):
    """A convolution whose kernel is divided by sqrt(fan in); `down` blurs first and halves height and width."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        dtype: DTypeLike,
        padding: int = 0,
        down: bool = False,
        activate: bool = True,
    ):
        self.padding, self.down, self.size = padding, down, size
        shape = (size, size, in_channels, out_channels)
        self.kernel = parameter(shape, dtype)
        self.bias = nnx.data(parameter((out_channels,), dtype) if activate else None)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        if self.down:
            x = _blur(x, (self.size + 1) // 2)
        kernel = self.kernel[...].astype(jnp.float32) / math.sqrt(math.prod(self.kernel.shape[:3]))
        x = jax.lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            (2, 2) if self.down else (1, 1),
            [(self.padding, self.padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return x if self.bias is None else _scaled_leaky_relu(x + self.bias[...].astype(x.dtype))


class ScaledResidual(nnx.Module):
    """Two convolutions plus a convolved shortcut; halves height and width."""

    def __init__(self, in_channels: int, out_channels: int, dtype: DTypeLike):
        self.conv1 = ScaledConv2d(in_channels, in_channels, 3, dtype, padding=1)
        self.conv2 = ScaledConv2d(in_channels, out_channels, 3, dtype, down=True)
        self.conv_skip = ScaledConv2d(in_channels, out_channels, 1, dtype, down=True, activate=False)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 o"]:
        return (self.conv2(self.conv1(x)) + self.conv_skip(x)) / math.sqrt(2)


class MotionEncoder(nnx.Module):
    """Encodes a face as one vector of motion: coefficients of a learnt orthonormal basis."""

    def __init__(self, config: AnimateConfig, dtypes: Dtypes):
        self.dtype, self.batch, channels = dtypes.activations, config.motion_encoder_batch_size, config.channels()
        self.conv_in = ScaledConv2d(3, channels[0], 1, dtypes.weights)
        self.res_blocks = nnx.List([ScaledResidual(c, o, dtypes.weights) for c, o in itertools.pairwise(channels)])
        style = config.motion_style_dim
        self.conv_out = ScaledConv2d(channels[-1], style, 4, dtypes.weights, activate=False)
        widths = [style] * config.MOTION_LAYERS + [config.motion_dim]
        layers = [Linear(a, b, (axes.EMBED, None), dtypes) for a, b in itertools.pairwise(widths)]
        self.motion_network = nnx.List(layers)
        self.basis = parameter((config.motion_encoder_dim, config.motion_dim), jnp.float32)

    def __call__(self, faces: Float[Array, "b f h w 3"]) -> Float[Array, "b f c"]:
        """`faces` in [-1, 1], of the encoder's size; runs `motion_encoder_batch_size` frames at a time."""
        frames = faces.reshape(-1, *faces.shape[2:])
        padding = -len(frames) % self.batch
        frames = jnp.pad(frames, ((0, padding), *[(0, 0)] * 3)).reshape(-1, self.batch, *faces.shape[2:])
        coefficients = jax.lax.map(self._coefficients, frames).reshape(-1, self.basis.shape[1])
        # The signs of the columns matter: they are those of Householder's reflections, here and in the reference.
        basis = jnp.linalg.qr(self.basis[...] + 1e-8)[0]
        motion = jnp.matmul(coefficients[: math.prod(faces.shape[:2])], basis.T, precision="highest")
        return motion.reshape(*faces.shape[:2], -1)

    def _coefficients(self, frames: Float[Array, "b h w 3"]) -> Float[Array, "b m"]:
        x = self.conv_in(frames.astype(self.dtype))
        for block in self.res_blocks:
            x = block(x)
        x = self.conv_out(x)[:, 0, 0]
        for layer in self.motion_network:  # without activations in between, as trained
            x = layer(x / math.sqrt(x.shape[-1]))
        return x.astype(jnp.float32)


class CausalConv1d(nnx.Module):
    """A causal convolution over time; the first entry is repeated before the start."""

    def __init__(self, size: int, in_channels: int, out_channels: int, stride: int, dtype: DTypeLike):
        self.stride = stride
        self.kernel = parameter((size, in_channels, out_channels), dtype)
        self.bias = parameter((out_channels,), dtype)

    def __call__(self, x: Float[Array, "b f c"]) -> Float[Array, "b f2 o"]:
        x = jnp.pad(x, ((0, 0), (self.kernel.shape[0] - 1, 0), (0, 0)), mode="edge")
        x = jax.lax.conv_general_dilated(
            x, self.kernel[...].astype(x.dtype), (self.stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return x + self.bias[...].astype(x.dtype)


class FaceEncoder(nnx.Module):
    """Encodes the motion of every frame as a few tokens for every latent frame."""

    SIZE, EPS = 3, 1e-6

    def __init__(self, config: AnimateConfig, dim: int, dtypes: Dtypes):
        self.heads, self.dtype = config.face_encoder_num_heads, dtypes.activations
        hidden = config.face_encoder_hidden_dim
        self.conv1_local = CausalConv1d(self.SIZE, config.motion_encoder_dim, hidden * self.heads, 1, dtypes.weights)
        self.conv2 = CausalConv1d(self.SIZE, hidden, hidden, 2, dtypes.weights)
        self.conv3 = CausalConv1d(self.SIZE, hidden, hidden, 2, dtypes.weights)
        self.out_proj = Linear(hidden, dim, (None, axes.EMBED), dtypes)
        self.padding_tokens = parameter((dim,), dtypes.weights)

    def __call__(self, motion: Float[Array, "b f c"]) -> Float[Array, "b f4 tokens e"]:
        """Tokens of every fourth frame, from the first on: one for each head, then a learnt padding token."""
        b, f, _ = motion.shape
        x = self.conv1_local(motion.astype(self.dtype)).reshape(b, f, self.heads, -1)
        x = self._activate(x.transpose(0, 2, 1, 3).reshape(b * self.heads, f, -1))
        x = self._activate(self.conv2(x))
        x = self.out_proj(self._activate(self.conv3(x)))
        x = x.reshape(b, self.heads, *x.shape[1:]).transpose(0, 2, 1, 3)
        return jnp.concatenate(
            [x, jnp.broadcast_to(self.padding_tokens[...].astype(x.dtype), x[:, :, :1].shape)], axis=2
        )

    def _activate(self, x: jax.Array) -> jax.Array:
        return jax.nn.silu(layer_norm(x, self.EPS)).astype(self.dtype)
