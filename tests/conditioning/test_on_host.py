"""What is encoded for later batches waits on the host: device memory does not grow with the prompts."""

from pathlib import Path

import jax
import numpy as np

from maxdiffusion import conditioning, request
from maxdiffusion.conditioning import text
from maxdiffusion.request.session import opened

ROOT = Path(__file__).parents[2]


def encoded(prompts):
    words = [f"prompt=[{', '.join(prompts)}]", "guidance_scale=1", "attention=dot_product", "progress=off"]
    words += ["size=32*32", "num_frames=1", f"ckpt_dir={ROOT / 'models' / 'wan_tiny'}"]
    job = request.load([str(ROOT / "configs" / "wan_tiny.yml"), *words])
    with opened(job, jax.devices()[:1]) as s:
        conditions = conditioning.encode(s, conditioning.Inputs({}))
        held = sum(array.nbytes for array in jax.live_arrays() if array.shape[-1:] == (64,) and array.ndim == 3)
        return conditions, conditions.contexts(job.videos[:1], False), held


def test_prompts_wait_on_the_host_and_a_batch_is_put_as_the_model_takes_it():
    _, one, held = encoded(["'a red circle'"])
    _, same, more = encoded(["'a red circle'", *(f"'a blue square {number}'" for number in range(12))])
    assert one.positive.text.shape[1:] == (text.MAX_LENGTH, 64) and one.negative is None
    assert isinstance(one.positive.text, jax.Array)
    assert np.array_equal(one.positive.text, same.positive.text)
    assert not one.positive.text[0, -1].any()
    assert more == held  # measured before: 131,072 bytes a prompt
