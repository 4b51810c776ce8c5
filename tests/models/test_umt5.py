"""The text encoder against `transformers.UMT5EncoderModel` on the same random weights."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from maxdiffusion import parallel
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.models.umt5.config import UMT5Config
from maxdiffusion.models.umt5.encoder import UMT5Encoder, position_buckets
from maxdiffusion.weights.loader import placed
from maxdiffusion.weights.tables import umt5 as table
from tests.support.parity import load_state_dict, match, paths, relative_error
from tests.support.umt5 import encoder_of

TINY = {"vocab_size": 50, "d_model": 24, "d_kv": 12, "d_ff": 40, "num_layers": 2, "num_heads": 4}
LENGTHS = (150, 9)  # past the last bucket's distance, and with padding


@functools.cache
def reference_model():
    torch.manual_seed(0)
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(**TINY)).eval()
    with torch.no_grad():  # position biases that matter, gains that are not one
        for name, parameter in model.named_parameters():
            if "norm" in name or "relative" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model


@functools.cache
def inputs():
    rng = np.random.default_rng(2)
    token_ids = rng.integers(0, TINY["vocab_size"], (2, max(LENGTHS)), dtype=np.int32)
    valid = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    return token_ids, valid


def run_reference(model):
    token_ids, valid = inputs()
    with torch.no_grad():
        hidden = model(torch.from_numpy(token_ids).long(), torch.from_numpy(valid).long()).last_hidden_state
    return hidden.float().numpy()[valid]


@functools.cache
def expected():
    return run_reference(reference_model())


@nnx.jit
def run(encoder, token_ids, valid):
    return encoder(token_ids, valid)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_matches_the_reference(scan_layers):
    token_ids, valid = inputs()
    hidden = run(encoder_of(reference_model(), scan_layers=scan_layers), jnp.asarray(token_ids), jnp.asarray(valid))
    assert hidden.dtype == jnp.float32
    assert relative_error(np.asarray(hidden)[valid], expected()) < 1e-5


def test_bf16_is_as_close_to_fp32_as_the_reference_in_bf16(tmp_path):
    """Bound in bf16: 3 % of the largest value, and no farther from fp32 than 1.25 times the reference's own bf16."""
    reference_model().save_pretrained(tmp_path)
    reference = transformers.UMT5EncoderModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    theirs = relative_error(run_reference(reference), expected())
    token_ids, valid = inputs()
    hidden = run(encoder_of(reference_model(), dtype=jnp.bfloat16), jnp.asarray(token_ids), jnp.asarray(valid))
    ours = relative_error(np.asarray(hidden)[valid], expected())
    assert ours < 0.03
    assert ours < 1.25 * theirs


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_parameter_dtypes_are_the_references(tmp_path, dtype):
    """Apart from the norms, which we keep in fp32."""
    reference_model().save_pretrained(tmp_path)
    name = jnp.dtype(dtype).name
    reference = transformers.UMT5EncoderModel.from_pretrained(tmp_path, dtype=getattr(torch, name))
    encoder = encoder_of(reference, dtype)
    params = paths(encoder)
    for source, tensor in reference.state_dict().items():
        _, path, _ = match(table.RULES, source)
        theirs = "float32" if "norm" in path else str(tensor.dtype).removeprefix("torch.")
        assert params[path].dtype.name == theirs, path


def test_position_buckets_at_every_distance():
    attention = reference_model().encoder.block[0].layer[0].SelfAttention
    distance = torch.arange(600)[None, :] - torch.arange(600)[:, None]
    np.testing.assert_array_equal(position_buckets(600, 32, 128), attention._relative_position_bucket(distance))


def test_either_name_of_the_tied_embedding_will_do():
    state_dict = dict(reference_model().state_dict())
    tied = state_dict.pop("shared.weight")
    config = UMT5Config.from_json(TINY)
    encoder = UMT5Encoder(config, Dtypes())
    load_state_dict(encoder, table.RULES, state_dict)
    np.testing.assert_array_equal(encoder.shared.embedding[...], tied.numpy())


@pytest.mark.slow
def test_a_layer_at_xxl_width_matches_the_reference():
    torch.manual_seed(0)
    config = transformers.UMT5Config(
        vocab_size=64, d_model=4096, d_kv=64, d_ff=10240, num_layers=1, num_heads=64, num_decoder_layers=1
    )
    reference = transformers.UMT5EncoderModel(config).eval()
    token_ids = np.arange(40, dtype=np.int32)[None]
    with torch.no_grad():
        theirs = reference(torch.from_numpy(token_ids).long()).last_hidden_state.numpy()
    hidden = run(encoder_of(reference), jnp.asarray(token_ids), jnp.ones(token_ids.shape, bool))
    assert relative_error(hidden, theirs) < 1e-4


def test_padding_is_never_attended():
    """No number of the output depends on what stands at a padded position."""
    token_ids, valid = inputs()
    encoder = encoder_of(reference_model())
    other = np.where(valid, token_ids, (token_ids + 7) % TINY["vocab_size"])
    ours = run(encoder, jnp.asarray(token_ids), jnp.asarray(valid))
    changed = run(encoder, jnp.asarray(other), jnp.asarray(valid))
    np.testing.assert_array_equal(np.asarray(ours)[valid], np.asarray(changed)[valid])
    assert np.isfinite(np.asarray(changed)).all()


def test_weights_over_eight_devices_are_gathered_layer_by_layer():
    token_ids, valid = inputs()
    encoder = encoder_of(reference_model())
    place = parallel.Placement(
        parallel.make_mesh(parallel.Degrees(context=8)), parallel.rules_for([("embed", ["fsdp", "context"])])
    )
    graph, shardings = nnx.split(placed(encoder, place))
    params = jax.tree.map(lambda leaf, to: jax.device_put(leaf, to.sharding), nnx.state(encoder), shardings)
    with parallel.use(place):
        args = params, parallel.put(token_ids), parallel.put(valid)
        program = jax.jit(lambda params, *args: nnx.merge(graph, params)(*args)).lower(*args).compile()
    assert relative_error(np.asarray(program(*args))[valid], expected()) < 1e-5
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert program.memory_analysis().argument_size_in_bytes < 0.25 * whole  # an eighth, norms and biases whole
    loop = [line for line in program.as_text().splitlines() if "while/body" in line]
    kinds = Counter(kind for line in loop for kind in re.findall(r" (all-\w+|reduce-scatter)(?:-start)?\(", line))
    assert kinds == {"all-gather": 7}  # q, k, v, o and the three of the feed-forward
