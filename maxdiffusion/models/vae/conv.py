"""The convolutions of the VAE, in a formulation for each platform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from maxdiffusion import parallel

# XLA's own 3-D convolution is slow on a CPU. Below this many input channels the three temporal taps are folded into the
# channels of one 2-D convolution, from it on they are three 2-D convolutions summed. Measured, fp32, GFLOP/s on one
# core with AVX-512 (`scripts/bench_vae.py conv`), of fold | sum | XLA 3-D | torch:
#     8 channels 96x96  49 |  21 |  4 |  11       96 channels 96x96  65 |  92 | 39 | 138
#    16 channels 96x96  76 |  51 |  9 |  10      192 channels 48x48 115 | 128 | 70 | 158
#    32 channels 48x48 101 | 114 | 17 |  35      384 channels 24x24 102 | 129 | 93 | 150
# Width or height unfolded into matmuls, im2col, banded kernels, Winograd F(2,3): slower than the better of the two.
_FOLD_BELOW = 32


def _same(size: int) -> tuple[int, int]:
    return (size // 2, size // 2)


def operands(dtype: DTypeLike) -> DTypeLike:
    """The dtype in which a convolution takes and keeps frames of that dtype: on a TPU it multiplies in bf16.

    By the compiler's cycle estimates for v6e, four frames of 1280x720 over 8 devices take 56 ms, and 61 with a cache in
    fp32, at a peak of 2.3 GiB instead of 2.8.
    """
    return jnp.bfloat16 if parallel.platform() == "tpu" else dtype


def _conv3d_xla(padded: jax.Array, kernel: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Valid in time, "same" in height and width, as one 3-D convolution; fp32 accumulation is the accelerators' own."""
    _, kh, kw, _, _ = kernel.shape
    kernel = kernel.astype(padded.dtype)
    return lax.conv_general_dilated(
        padded, kernel, (1, 1, 1), ((0, 0), _same(kh), _same(kw)), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    ).astype(dtype)


def _conv3d_tpu(padded: jax.Array, kernel: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The same from a convolution over frames and rows with the columns as its batch; products of bf16, sums in fp32.

    A TPU's convolution has its batch in the second innermost dimension. For a single video XLA makes a batch of strips
    of the picture, with pads and transposes that cost several times the products. Columns are already there; the three
    columns of the kernel become channels, which fill a matrix unit better. Where devices split the width, they exchange
    single columns only. A TPU rounds fp32 operands to bf16 at default precision; here they are rounded before copies.
    """
    kt, kh, kw, c, o = kernel.shape
    return _over_columns(_seen(padded, kw), kernel.reshape(kt, kh, kw * c, o), _same(kh)).astype(dtype)


def _seen(x: jax.Array, columns: int) -> jax.Array:
    """What each column sees of so many around it, as channels (column, channel) in bf16."""
    return jnp.concatenate([_shifted(x.astype(jnp.bfloat16), columns // 2 - tap) for tap in range(columns)], axis=-1)


def _over_columns(x: jax.Array, kernel: jax.Array, rows: tuple[int, int]) -> jax.Array:
    """A convolution over frames and rows, padded by so many `rows`, with the columns as its batch; fp32 out."""
    return lax.conv_general_dilated(
        x,
        kernel[None].astype(jnp.bfloat16),
        (1, 1, 1),
        ((0, 0), (0, 0), rows),
        dimension_numbers=lax.ConvDimensionNumbers((3, 4, 0, 1, 2), (4, 3, 0, 1, 2), (3, 4, 0, 1, 2)),
        preferred_element_type=jnp.float32,
    )


def _shifted(x: jax.Array, columns: int) -> jax.Array:
    """Shifts the video right by `columns` (left, if negative) and fills with zeros."""
    return lax.pad(x, jnp.zeros((), x.dtype), [*[(0, 0, 0)] * 3, (columns, -columns, 0), (0, 0, 0)])


def _conv3d_cpu(padded: jax.Array, kernel: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The same convolution as a sum of 2-D convolutions."""
    kernel = kernel.astype(padded.dtype)
    kt, kh, kw, c, o = kernel.shape
    b, f, h, w, _ = padded.shape
    f -= kt - 1
    taps = [padded[:, t : t + f].reshape(b * f, h, w, c) for t in range(kt)]
    if c < _FOLD_BELOW:
        taps = [jnp.concatenate(taps, axis=-1)]
        kernel = kernel.transpose(1, 2, 0, 3, 4).reshape(1, kh, kw, kt * c, o)
    out = sum(
        lax.conv_general_dilated(
            tap,
            weight,
            (1, 1),
            (_same(kh), _same(kw)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=jnp.float32,
        )
        for tap, weight in zip(taps, kernel, strict=True)
    )
    return jnp.asarray(out).reshape(b, f, h, w, o).astype(dtype)


def causal_conv3d(
    x: Float[Array, "b f h w c"],
    kernel: Float[Array, "kt kh kw c o"],
    bias: Float[Array, " o"],
    cache: Float[Array, "b past h w c"] | None,
) -> tuple[Float[Array, "b f h w o"], Float[Array, "b past h w c"]]:
    """A convolution over the present and `past = kt - 1` earlier frames; "same" in height and width, zeros outside.

    `cache` holds those earlier frames; None means zeros (the start of a video). Returns the output in x's dtype and the
    cache for the next chunk. On a TPU convolutions multiply in bfloat16 whatever the dtype, and the cache has no more.
    Reference: WanCausalConv3d in diffusers' autoencoder_kl_wan.py.
    """
    past = kernel.shape[0] - 1
    b, f, h, w, c = x.shape
    if cache is None:
        cache = jnp.zeros((b, past, h, w, c), operands(x.dtype))
    padded = jnp.concatenate([cache, x.astype(operands(x.dtype))], axis=1)
    cpu, tpu, default = (functools.partial(form, dtype=x.dtype) for form in (_conv3d_cpu, _conv3d_tpu, _conv3d_xla))
    out = lax.platform_dependent(padded, kernel.astype(x.dtype), cpu=cpu, tpu=tpu, default=default)
    return (out.astype(jnp.float32) + bias).astype(x.dtype), padded[:, f:]


def conv2d(
    x: Float[Array, "b f h w c"],
    kernel: Float[Array, "kh kw c o"],
    bias: Float[Array, " o"],
    stride: int,
    padding: tuple[int, int],
) -> Float[Array, "b f hout wout o"]:
    """A 2-D convolution of single frames, in x's dtype; `padding` is (before, after) in height and in width."""
    b, f, h, w, c = x.shape
    out = lax.conv_general_dilated(
        x.reshape(b * f, h, w, c),
        kernel.astype(x.dtype),
        (stride, stride),
        (padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return (out.astype(jnp.float32) + bias).astype(x.dtype).reshape(b, f, *out.shape[1:])


# Row (or column) 2i + p of the doubled image sees rows i + p - 1 and i + p of the image: which of the three taps fall
# on each. Axes: phase p, input row, tap. And the same of the three columns around i.
_PHASES = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)
_PHASES_OF_THREE = np.stack([np.pad(phase, ((p, 1 - p), (0, 0))) for p, phase in enumerate(_PHASES)])


def doubled_conv2d(
    x: Float[Array, "b f h w c"], kernel: Float[Array, "3 3 c o"], bias: Float[Array, " o"]
) -> Float[Array, "b f 2*h 2*w o"]:
    """Nearest-neighbour doubling of height and width, then a "same" 3x3 convolution, without the doubled image.

    Each of the four output phases is a 2x2 convolution of the small image: 4/9 of the multiplications and half of the
    memory (measured on one core: 2.4 times as fast at 192 channels, 1.6 at 384, never slower).
    """
    kernel = kernel.astype(jnp.float32)
    return lax.platform_dependent(x, kernel, bias, tpu=_doubled_tpu, default=_doubled_xla)


def _doubled_xla(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    b, f, h, w, _ = x.shape
    o = kernel.shape[-1]
    phases = jnp.einsum("pir,qjs,rsco->ijcpqo", _PHASES, _PHASES, kernel, precision="highest")
    y = conv2d(x, phases.reshape(2, 2, -1, 4 * o), jnp.tile(bias, 4), 1, (1, 1)).reshape(b, f, h + 1, w + 1, 2, 2, o)
    rows = [jnp.stack([y[:, :, p : p + h, q : q + w, p, q] for q in (0, 1)], axis=4) for p in (0, 1)]
    return jnp.stack(rows, axis=3).reshape(b, f, 2 * h, 2 * w, o)


def _doubled_tpu(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """The same as `_conv3d_tpu`: a convolution for each phase of the rows, the phases of the columns as its channels.

    By the compiler's cycle estimates for v6e, with the norms around it, 360 x 80 pixels of four frames and 192 channels
    take 5.1 ms and `_doubled_xla` 7.7; 180 x 40 and 384 channels 2.3 and 4.5. Over 8 devices a chunk of 1280x720 takes
    61 ms, and with `_doubled_xla` 72.
    """
    b, f, h, w, c = x.shape
    o = kernel.shape[-1]
    phases = jnp.einsum("pir,qjs,rsco->pijcqo", _PHASES, _PHASES_OF_THREE, kernel, precision="highest")
    seen, biases = _seen(x, 3), jnp.tile(bias, 2).astype(jnp.float32)
    rows = [_over_columns(seen, phases[p].reshape(1, 2, 3 * c, 2 * o), (1 - p, p)) + biases for p in (0, 1)]
    return jnp.stack(rows, axis=3).reshape(b, f, 2 * h, 2 * w, o).astype(x.dtype)
