"""What is said of device memory."""

from pathlib import Path

import pytest

from maxdiffusion import request
from maxdiffusion.parallel import use
from maxdiffusion.request import fitting
from maxdiffusion.request.nets import read_configs
from maxdiffusion.request.session import Setup
from maxdiffusion.runtime import memory

CONFIGS = Path(__file__).parents[2] / "configs"


def job_of(page, *words):
    return request.load([str(CONFIGS / f"{page}.yml"), "prompt=a cat", *words])


@pytest.mark.parametrize(
    ("phase", "page", "given", "said"),
    [
        ("denoise", "wan2.2_t2v_a14b", (), ["expert_residency=in_turn", "guidance_mode=two_pass", "[[embed,"]),
        ("denoise", "wan2.1_t2v_14b", ("guidance_scale=1", "ici_fsdp_parallelism=8"), ["quantization=auto"]),
        ("denoise", "wan2.1_t2v_14b", ("guidance_scale=1", "ici_fsdp_parallelism=8", "quantization=int8"), []),
        ("load transformer", "wan_tiny", (), ["quantization=auto"]),
        ("denoise", "wan2.1_t2v_14b", ("activations_dtype=float32",), ["activations_dtype=bfloat16"]),
        ("load text_encoder", "wan_tiny", (), ["text_encoder_dtype=bfloat16"]),
        ("decode", "wan2.1_t2v_14b", ("per_device_batch_size=2",), ["per_device_batch_size=1", "vae_dtype=bfloat16"]),
    ],
)
def test_the_words_are_those_that_the_run_does_not_have_yet(phase, page, given, said):
    words = fitting.words(job_of(page, *given), phase)
    assert words.endswith("more devices, a smaller size or num_frames (plan=here counts what fits)")
    for one in said:
        assert one in words
    if not said:
        assert words.startswith("more devices")


def test_a_run_that_cannot_fit_is_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(memory, "per_device", lambda: 4 * 2**30)
    for size, warned in (("96*96", False), ("8192*8192", True)):
        caplog.clear()
        job = job_of(
            "wan_tiny", f"size={size}", "attention=chunked", "ici_data_parallelism=-1", "ici_context_parallelism=1"
        )
        setup = Setup.of(job, read_configs(job))
        with use(setup.placement):
            fitting.warn(job, setup.recipe, setup.configs, setup.plan, setup.placement.mesh)
        assert ("denoise needs about" in caplog.text and "decode needs about" in caplog.text) == warned
