"""Guidance: the two modes agree, in the order stated, and scale 1 is none."""

import jax.numpy as jnp
import numpy as np
import pytest

from maxdiffusion.denoise import BatchedGuidance, Contexts, NoGuidance, TwoPassGuidance
from maxdiffusion.denoise.guidance import choose

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((3, 2, 4, 4, 2)), jnp.float32)
T = jnp.asarray([999.0, 500.0, 3.0])
CONTEXTS = Contexts(
    {"text": jnp.asarray(RNG.standard_normal((3, 5, 2)), jnp.float32)},
    {"text": jnp.asarray(RNG.standard_normal((3, 5, 2)), jnp.float32)},
)


def predict(x, timestep, context):
    """Every example sees its own timestep and text only."""
    text = jnp.tanh(context["text"]).sum(1)
    return jnp.sin(x * timestep[:, None, None, None, None] / 100) + x * text[:, None, None, None, :]


@pytest.mark.parametrize("guidance", [TwoPassGuidance(), BatchedGuidance()])
def test_formula(guidance):
    c, u = (np.asarray(predict(X, T, context), np.float64) for context in CONTEXTS)
    guided = guidance(predict, X, T, CONTEXTS, 4.5)
    np.testing.assert_allclose(guided, u + 4.5 * (c - u), rtol=1e-5, atol=1e-5)


def test_batched_calls_once_in_the_order_stated():
    calls = []

    def spy(x, timestep, context):
        calls.append((x, timestep, context["text"]))
        return predict(x, timestep, context)

    BatchedGuidance()(spy, X, T, CONTEXTS, 3.0)
    ((x, timestep, text),) = calls
    np.testing.assert_array_equal(x, np.repeat(X, 2, axis=0))
    np.testing.assert_array_equal(timestep, np.repeat(T, 2))
    np.testing.assert_array_equal(text[0::2], CONTEXTS.positive["text"])
    np.testing.assert_array_equal(text[1::2], CONTEXTS.negative["text"])


def test_scale_one_is_none():
    guided = TwoPassGuidance()(predict, X, T, CONTEXTS, 1.0)
    alone = NoGuidance()(predict, X, T, Contexts(CONTEXTS.positive), 1.0)
    np.testing.assert_allclose(guided, alone, rtol=1e-5, atol=1e-6)


def test_choose(caplog):
    assert choose("batched", [1.0, 1.0], 10, 20) == NoGuidance()
    assert choose("batched", [1.0, 5.0], 10**6, 2 * 10**6) == BatchedGuidance()
    assert choose("two_pass", [5.0], 10, 20) == TwoPassGuidance()
    with caplog.at_level("INFO"):
        assert choose("auto", [5.0], 180, 360) == BatchedGuidance()
        assert choose("auto", [5.0], 32760, 65520) == TwoPassGuidance()
        assert choose("auto", [5.0], 75600, 75600) == BatchedGuidance()  # the data axis takes one branch each
    assert "batched" in caplog.text and "two_pass" in caplog.text and "65520" in caplog.text
