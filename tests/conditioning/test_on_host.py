"""What is encoded for later batches waits on the host: device memory does not grow with the prompts."""

import gc
from pathlib import Path

import jax
import numpy as np

from maxdiffusion import conditioning, request
from maxdiffusion.conditioning import text
from maxdiffusion.request.session import opened

ROOT = Path(__file__).parents[2]


def encoded(prompts):
    words = [
        f"prompt=[{', '.join(prompts)}]",
        "guidance_scale=1",
        "attention=dot_product",
        "progress=off",
        "jax_cache_dir=",
    ]
    words += ["size=32*32", "num_frames=1", f"ckpt_dir={ROOT / 'models' / 'wan_tiny'}"]
    job = request.load([str(ROOT / "configs" / "wan_tiny.yml"), *words])
    with opened(job, jax.devices()[:1]) as s:
        conditions = conditioning.encode(s, conditioning.Inputs({}))
        gc.collect()  # the encoder
        held = sum(array.nbytes for array in jax.live_arrays() if array.shape[-1:] == (64,))
        contexts = conditions.contexts(job.videos[:1], False)
        assert isinstance(contexts.positive.text, jax.Array) and contexts.negative is None
        return np.array(contexts.positive.text), held


def test_prompts_wait_on_the_host_and_a_batch_is_put_as_the_model_takes_it():
    one, held = encoded(["'a red circle'"])
    same, more = encoded(["'a red circle'", *(f"'a blue square {number}'" for number in range(12))])
    assert one.shape == (1, text.MAX_LENGTH, 64) and not one[0, -1].any()
    assert np.array_equal(one, same)
    assert more == held  # measured before: 131,072 bytes a prompt
