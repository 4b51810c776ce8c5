"""The VAE against diffusers' AutoencoderKLWan on the same random weights."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import AutoencoderKLWan

from maxdiffusion.errors import UserError
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.models.vae import blocks, conv, model
from maxdiffusion.models.vae.config import VAEConfig
from maxdiffusion.models.vae.model import WanVAE
from tests.support.parity import drawn, paths, relative_error
from tests.support.vae import TINY, Pair


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


@pytest.fixture(scope="module")
def latents() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((1, 5, 3, 5, 4), np.float32)


@pytest.fixture(scope="module")
def video() -> np.ndarray:
    return np.random.default_rng(2).uniform(-1, 1, (1, 17, 24, 40, 3)).astype(np.float32)


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_decode_frame_by_frame_equals_the_reference(pair, latents, frames):
    chunks = [np.asarray(c) for c in pair.ours.decode_chunks(jnp.asarray(latents[:, :frames]), chunk=1)]
    assert [c.shape[1] for c in chunks] == [1] + [4] * (frames - 1)
    assert relative_error(np.concatenate(chunks, axis=1), pair.decode(latents[:, :frames])) < 1e-5


@pytest.mark.parametrize("chunk", [None, 2])
def test_decode_does_not_depend_on_where_the_video_is_cut(pair, latents, chunk):
    lengths = [c.shape[1] for c in pair.ours.decode_chunks(jnp.asarray(latents), chunk=chunk)]
    assert lengths == ([17] if chunk is None else [1, 8, 8])
    assert relative_error(pair.ours.decode(jnp.asarray(latents), chunk=chunk), pair.decode(latents)) < 1e-5


def test_a_call_without_memory_is_tried_again_by_half_as_many_frames(pair, latents, monkeypatch, caplog):
    """Memory for two latent frames: 5 fail, then 1 + 2 + 2 fit, also of the next video; nothing is given twice."""
    ours, program = pair.load(), model.program

    def limited(later=False):
        def run(graph, state, name, cache, x):
            if x.shape[1] > 2:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
            return program(later)(graph, state, name, cache, x)

        return run

    monkeypatch.setattr(model, "program", limited)
    for _ in range(2):
        assert [chunk.shape[1] for chunk in ours.decode_chunks(jnp.asarray(latents))] == [1, 8, 8]
    assert caplog.text.count("decodes 5 latent frames; tried again by 2") == 1
    assert relative_error(ours.decode(jnp.asarray(latents)), pair.decode(latents)) < 1e-5
    with pytest.raises(jax.errors.JaxRuntimeError):  # an explicit chunk is kept
        ours.decode(jnp.asarray(latents), chunk=4)


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_encode_frame_by_frame_equals_the_reference(pair, video, frames):
    got = pair.ours.encode(jnp.asarray(video[:, :frames]), chunk=1)
    assert relative_error(got, pair.encode(video[:, :frames])) < 1e-5


def test_encode_at_once_equals_the_reference(pair, video):
    assert relative_error(pair.ours.encode(jnp.asarray(video)), pair.encode(video)) < 1e-5


def test_decode_in_bf16_stays_near_the_fp32_reference(pair, latents):
    ours = pair.load(dtypes=Dtypes(jnp.bfloat16, jnp.bfloat16))
    got = ours.decode(jnp.asarray(latents[:, :2]))
    assert got.dtype == jnp.float32
    assert relative_error(got, pair.decode(latents[:, :2])) < 0.05


# The WAN 2.2 VAE: channels that the averaging and repeating shortcuts mix, and a wider decoder.
WAN22 = {
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "decoder_base_dim": 12,
    "scale_factor_spatial": 16,
}


@pytest.fixture(scope="module")
def pair22() -> Pair:
    return Pair(**WAN22)


@pytest.mark.parametrize("chunk", [1, None])
def test_wan22_decode_equals_the_reference(pair22, latents, chunk):
    lengths = [c.shape for c in pair22.ours.decode_chunks(jnp.asarray(latents[:, :3]), chunk=chunk)]
    assert lengths == [(1, frames, 48, 80, 3) for frames in ([9] if chunk is None else [1, 4, 4])]
    got = pair22.ours.decode(jnp.asarray(latents[:, :3]), chunk=chunk)
    assert relative_error(got, pair22.decode(latents[:, :3])) < 1e-5


@pytest.mark.parametrize("chunk", [1, None])
def test_wan22_encode_equals_the_reference(pair22, video, chunk):
    video = np.pad(video[:, :9], ((0, 0), (0, 0), (0, 8), (0, 8), (0, 0)))  # sides that divide by 16
    got = pair22.ours.encode(jnp.asarray(video), chunk=chunk)
    assert got.shape == (1, 3, 2, 3, 4)
    assert relative_error(got, pair22.encode(video)) < 1e-5


@pytest.mark.slow
def test_official_depth_and_a_wider_decoder(latents, video):
    pair = Pair(num_res_blocks=2, decoder_base_dim=12)
    assert relative_error(pair.ours.decode(jnp.asarray(latents)), pair.decode(latents)) < 1e-5
    assert relative_error(pair.ours.encode(jnp.asarray(video)), pair.encode(video)) < 1e-5


@pytest.mark.parametrize("channels", [8, 32])  # both sides of the choice between folding and summing the taps
@pytest.mark.parametrize("size", [(3, 3, 3), (3, 1, 1)])
def test_convolutions_of_all_platforms_agree(channels, size):
    assert (channels < conv._FOLD_BELOW) == (channels == 8)
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((2, 5, 4, 6, channels), np.float32))
    kernel = jnp.asarray(rng.standard_normal((*size, channels, 7), np.float32))
    assert relative_error(jax.jit(conv._conv3d_cpu)(x, kernel), jax.jit(conv._conv3d_xla)(x, kernel)) < 1e-5
    rounded = [y.astype(jnp.bfloat16).astype(jnp.float32) for y in (x, kernel)]  # so are a TPU's operands
    want = jax.jit(conv._conv3d_xla)(*rounded)
    assert relative_error(jax.jit(conv._conv3d_tpu)(x, kernel), want) < 1e-5
    assert relative_error(want, jax.jit(conv._conv3d_xla)(x, kernel)) > 1e-4  # else the line above checks less


def test_causal_convolution_may_be_cut_anywhere():
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.standard_normal((1, 6, 4, 5, 3), np.float32))
    kernel, bias = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((3, 3, 3, 3, 2), (2,)))
    whole, last = conv.causal_conv3d(x, kernel, bias, None)
    cache, parts = None, []
    for a, b in ((0, 1), (1, 2), (2, 6)):
        part, cache = conv.causal_conv3d(x[:, a:b], kernel, bias, cache)
        parts.append(part)
    assert relative_error(jnp.concatenate(parts, axis=1), whole) < 1e-6
    np.testing.assert_array_equal(cache, last)
    np.testing.assert_array_equal(cache, x[:, -2:])


def test_doubled_convolution_equals_doubling_then_convolving():
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.standard_normal((2, 2, 3, 5, 4), np.float32))
    kernel, bias = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((3, 3, 4, 2), (2,)))
    doubled = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    want = conv.conv2d(doubled, kernel, bias, 1, (1, 1))
    assert relative_error(conv.doubled_conv2d(x, kernel, bias), want) < 1e-5
    assert 1e-4 < relative_error(conv._doubled_tpu(x, kernel, bias), want) < 1e-2  # a TPU rounds operands to bf16


def test_attention_in_blocks_of_queries_equals_all_at_once(monkeypatch):
    block = drawn(blocks.AttentionBlock(8, jnp.float32))
    x = jnp.asarray(np.random.default_rng(6).standard_normal((1, 2, 6, 5, 8), np.float32))
    run = lambda: jax.jit(lambda x: block(x, None)[0])(x)  # noqa: E731
    whole = run()
    monkeypatch.setattr(blocks, "_ATTENTION_LOGITS_BYTES", 4 * 2 * (2 * 5) * 30)  # two of the six rows
    assert "length=3" in str(jax.make_jaxpr(lambda x: block(x, None)[0])(x))
    assert relative_error(run(), whole) < 1e-6


def test_chunks_follow_memory_and_are_alike():
    vae = WanVAE(VAEConfig(latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16))
    for name, width, latent_frames, calls in (
        ("decode", 104, 21, (1, 20)),  # one frame at a time
        ("decode", 12, 21, (1, 3)),  # at most 9: 7 each, the last filled up
        ("decode", 12, 5, (1,)),
        ("encode", 12, 21, (1, 3)),
    ):
        shape = (1, latent_frames, width * 60 // 104 if width > 12 else 12, width, 16)
        if name == "encode":
            shape = (1, 1 + 4 * (latent_frames - 1), *(8 * side for side in shape[2:4]), 3)
        assert vae.calls(name, shape) == calls


@pytest.mark.parametrize(
    ("chunk", "lengths"),
    [
        pytest.param(*each, marks=pytest.mark.slow)
        for each in ((3, [1, 12, 12, 4]), (4, [1, 16, 12]), (6, [1, 16, 12]), (7, [1, 28]))
    ],
)
def test_a_prime_number_of_frames_after_the_first_takes_as_few_chunks_as_fit(pair, chunk, lengths):
    rng = np.random.default_rng(7)
    latents = jnp.asarray(rng.standard_normal((1, 8, 2, 3, 4), np.float32))  # 7 after the first
    chunks = list(pair.ours.decode_chunks(latents, chunk=chunk))
    assert [part.shape[1] for part in chunks] == lengths
    assert relative_error(jnp.concatenate(chunks, axis=1), pair.ours.decode(latents)) < 1e-5
    video = jnp.asarray(rng.uniform(-1, 1, (1, 29, 16, 24, 3)).astype(np.float32))
    assert relative_error(pair.ours.encode(video, chunk=chunk), pair.ours.encode(video)) < 1e-5


def test_two_programs_decode_a_video_of_any_length(pair, latents):
    from maxdiffusion.models.vae.model import program

    list(pair.ours.decode_chunks(jnp.asarray(latents[:, :2]), chunk=1))
    programs = [program(later)._cache_size() for later in (False, True)]
    list(pair.ours.decode_chunks(jnp.asarray(np.repeat(latents, 3, axis=1)), chunk=1))
    assert [program(later)._cache_size() for later in (False, True)] == programs


def test_every_parameter_names_its_axes():
    for path, leaf in paths(WanVAE(VAEConfig.from_json(TINY))).items():
        assert leaf.get_metadata()["out_sharding"] == (None,) * len(leaf.shape), path


@pytest.mark.parametrize("shape", [(1, 6, 16, 16, 3), (1, 5, 20, 16, 3), (1, 0, 16, 16, 3)])
def test_a_video_that_does_not_fit_is_refused(shape):
    with pytest.raises(UserError, match="cannot be encoded"):
        WanVAE(VAEConfig.from_json(TINY)).encode(jnp.zeros(shape))


def test_config_of_the_official_checkpoint():
    config = VAEConfig.from_json(dict(AutoencoderKLWan().config))
    assert (config.z_dim, config.temporal_factor, config.spatial_factor, config.decoder_dim) == (16, 4, 8, 96)
    assert len(config.latents_std) == 16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"patch_size": 2, "in_channels": 3}, "make it 12"),
        ({"attn_scales": [0.5]}, "attn_scales"),
        ({"z_dims": 4}, "not supported: z_dims"),
        ({"base_dim": "x"}, "base_dim='x', which is not int"),
        ({"z_dim": None}, "z_dim=None, which is not int"),
        ({"temperal_downsample": [0, 1, 1]}, "temperal_downsample"),
        ({"z_dim": 5}, "needs 5"),
        ({"latents_std": [1.0, 0.0, 1.0, 1.0]}, "positive"),
        ({"temperal_downsample": [True, True]}, "needs 3 entries"),
        ({"scale_factor_spatial": 16}, "make it 8"),
    ],
)
def test_config_that_cannot_run_is_refused(change, said):
    with pytest.raises(UserError, match=said):
        VAEConfig.from_json(TINY | change)


def test_config_without_statistics_is_refused():
    with pytest.raises(UserError, match="latents_std"):
        VAEConfig.from_json({k: v for k, v in TINY.items() if k != "latents_std"})


def test_config_needs_no_jax():
    code = "import sys, maxdiffusion.models.vae.config; assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
