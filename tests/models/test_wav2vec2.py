"""The wav2vec 2.0 encoder against transformers' on the same random weights."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from maxdiffusion.errors import UserError
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.models.wav2vec2.config import SAMPLE_RATE, Wav2Vec2Config
from maxdiffusion.models.wav2vec2.encoder import Wav2Vec2, normalised
from maxdiffusion.weights.tables import wav2vec2 as table
from tests.support.parity import load_state_dict, relative_error

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "conv_dim": [12] * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "conv_bias": True,
}


def sound(seconds):
    times = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    noise = 0.1 * np.random.default_rng(0).standard_normal(len(times))
    return (0.3 + np.sin(2 * np.pi * 220 * times) + noise).astype(np.float32)


@pytest.mark.parametrize("seconds", [0.5, 11, 61])  # two blocks of queries; three of convolutions
def test_hidden_states_match_the_reference(seconds):
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(**TINY, vocab_size=8, tie_last_hidden_states=True)  # normed, as in 4.51
    reference = transformers.Wav2Vec2ForCTC(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    extract = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    samples = sound(seconds)
    values = extract(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values
    with torch.no_grad():
        theirs = torch.cat(reference.wav2vec2(values, output_hidden_states=True).hidden_states)
    state_dict = {k: v for k, v in reference.state_dict().items() if "masked_spec" not in k and "lm_head" not in k}
    ours = Wav2Vec2(Wav2Vec2Config.from_json(config.to_dict()), Dtypes())
    load_state_dict(ours, table.RULES, state_dict)
    hidden = nnx.jit(lambda model, x: model(x))(ours, jnp.asarray(normalised(samples))[None])
    assert hidden.shape == (1, ours.config.hidden_states, ours.config.length(len(samples)), 32)
    assert relative_error(hidden[0], theirs.numpy()) < 1e-4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"feat_extract_norm": "group"}, "feat_extract_norm='group'"),
        ({"conv_dim": [12] * 6}, "as many"),
        ({"num_attention_heads": 5}, "divide by its 5 heads"),
    ],
)
def test_another_kind_of_encoder_is_refused(change, says):
    with pytest.raises(UserError, match=says):
        Wav2Vec2Config.from_json(TINY | change)
