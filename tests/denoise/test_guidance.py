"""Guidance: the two modes agree, in the order stated, and scale 1 is none."""

import jax.numpy as jnp
import numpy as np
import pytest

from maxdiffusion.denoise.guidance import BatchedGuidance, NoGuidance, TwoPassGuidance, choose
from maxdiffusion.models.dit.context import Contexts, Shared, without_shared

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


def guided(guidance, contexts, scale):
    return guidance.combine([predict(*call) for call in guidance.calls(X, T, contexts)], scale)


@pytest.mark.parametrize("guidance", [TwoPassGuidance(), BatchedGuidance()])
def test_formula(guidance):
    c, u = (np.asarray(predict(X, T, context), np.float64) for context in CONTEXTS)
    np.testing.assert_allclose(guided(guidance, CONTEXTS, 4.5), u + 4.5 * (c - u), rtol=1e-5, atol=1e-5)


def test_batched_calls_once_in_the_order_stated():
    ((x, timestep, context),) = BatchedGuidance().calls(X, T, CONTEXTS)
    np.testing.assert_array_equal(x, np.repeat(X, 2, axis=0))
    np.testing.assert_array_equal(timestep, np.repeat(T, 2))
    np.testing.assert_array_equal(context["text"][0::2], CONTEXTS.positive["text"])
    np.testing.assert_array_equal(context["text"][1::2], CONTEXTS.negative["text"])


@pytest.mark.parametrize("guidance", [TwoPassGuidance(), BatchedGuidance()])
def test_both_branches_are_given_the_arrays_that_they_share(guidance):
    keys = jnp.ones((7, 2))
    positive, negative = ({**context, "keys": Shared(keys)} for context in CONTEXTS)
    contexts = Contexts(positive, without_shared(negative))
    assert contexts.negative["keys"] == Shared(None)
    for _, _, context in guidance.calls(X, T, contexts):
        assert context["keys"].value is keys and context["text"].shape[0] in (3, 6)


def test_scale_one_is_none():
    alone = guided(NoGuidance(), Contexts(CONTEXTS.positive), 1.0)
    np.testing.assert_allclose(guided(TwoPassGuidance(), CONTEXTS, 1.0), alone, rtol=1e-5, atol=1e-6)


def test_choose(caplog):
    assert choose("batched", 10**6, 2 * 10**6) == BatchedGuidance()
    assert choose("two_pass", 10, 20) == TwoPassGuidance()
    with caplog.at_level("INFO"):
        assert choose("auto", 180, 360) == BatchedGuidance()
        assert choose("auto", 32760, 65520) == TwoPassGuidance()
        assert choose("auto", 75600, 75600) == BatchedGuidance()  # the data axis takes one branch each
    assert "batched" in caplog.text and "two_pass" in caplog.text and "65520" in caplog.text
