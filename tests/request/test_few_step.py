"""What few-step checkpoints ask for, what wins over it, and warnings by the names of files."""

import json
from pathlib import Path

import numpy as np
import pytest

from maxdiffusion import request
from maxdiffusion.config import schema
from maxdiffusion.errors import UserError
from maxdiffusion.request import few_step
from maxdiffusion.request.session import recipe_of
from tests.support.safetensors_file import write

FASTWAN = {"_class_name": "WanDMDPipeline"}


def load(checkpoint, index, *words):
    folder = checkpoint("some", "wan2.1-t2v-1.3b")
    if index is not None:
        (folder / "model_index.json").write_text(json.dumps(index))
    return request.load(["base.yml", f"ckpt_dir={folder}", *words]).cfg


def test_a_dmd_pipeline_runs_as_it_was_trained(place: Path, checkpoint) -> None:
    cfg = load(checkpoint, FASTWAN)
    assert (cfg.solver, cfg.sigmas, cfg.num_inference_steps) == ("renoise", (1.0, 0.757, 0.522), 3)
    assert (cfg.guidance_scale, cfg.flow_shift) == (1.0, 1.0)
    assert f"solver: renoise  ({place / 'some'} is a WanDMDPipeline)" in cfg.describe()


@pytest.mark.parametrize(
    ("words", "solver", "sigmas", "scale"),
    [
        (["guidance_scale=3"], "renoise", (1.0, 0.757, 0.522), 3.0),
        (["solver=euler"], "euler", (1.0, 0.757, 0.522), 1.0),
        (["num_inference_steps=8"], "renoise", (), 1.0),
        (["sigmas=[1, 0.5]"], "renoise", (1.0, 0.5), 1.0),
        (["solver=unipc", "sample_shift=5", "guidance_scale=5"], "unipc", (), 5.0),
    ],
)
def test_what_is_given_wins(place: Path, checkpoint, words, solver, sigmas, scale) -> None:
    cfg = load(checkpoint, FASTWAN, *words)
    assert (cfg.solver, cfg.sigmas, cfg.guidance_scale) == (solver, sigmas, scale)


@pytest.mark.parametrize(
    ("block", "solver", "sigmas", "scale"),
    [
        ({}, "euler", (0.999, 0.749, 0.499, 0.249), 1.0),
        ({"num_inference_steps": 2, "solver": "sde"}, "renoise", (0.999, 0.499), 1.0),
        ({"denoising_timesteps": [999, 500.5], "guidance_scale": 3}, "euler", (0.999, 0.5005), 3.0),
        ({"num_inference_steps": 1, "denoising_timesteps": [1000]}, "euler", (1.0,), 1.0),
    ],
)
def test_a_dmd2_block(place: Path, checkpoint, block, solver, sigmas, scale) -> None:
    cfg = load(checkpoint, {"_class_name": "WanPipeline", "dmd2_config": block})
    assert (cfg.solver, cfg.sigmas, cfg.guidance_scale) == (solver, sigmas, scale)


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ("four", "must be an object"),
        ({"solver": "heun"}, "has the solver 'heun'; it must be ode or sde"),
        ({"guidance_scale": 0.5}, "has the guidance_scale 0.5; it must be a number from 1 up"),
        ({"num_inference_steps": 0}, "has 0 num_inference_steps"),
        ({"num_inference_steps": "4"}, "has '4' num_inference_steps"),
        ({"num_inference_steps": 3, "denoising_timesteps": [999]}, "as many as num_inference_steps"),
        ({"denoising_timesteps": []}, "denoising_timesteps []"),
        ({"denoising_timesteps": [999, 0]}, "above 0 and up to 1000"),
        ({"denoising_timesteps": [500, 999]}, "sigmas must fall, but 0.5 is followed by 0.999"),
    ],
)
def test_a_block_that_cannot_be_used(place: Path, checkpoint, block, sentence) -> None:
    with pytest.raises(UserError) as caught:
        load(checkpoint, {"dmd2_config": block})
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [None, {"_class_name": "WanPipeline"}])
def test_other_checkpoints_ask_for_nothing(place: Path, checkpoint, index) -> None:
    cfg = load(checkpoint, index)
    assert (cfg.solver, cfg.sigmas, cfg.num_inference_steps, cfg.guidance_scale) == ("unipc", (), 50, 5.0)


def test_the_record_of_a_few_step_run_loads_to_the_same_config(place: Path) -> None:
    a14b = ["base.yml", "model_name=wan2.2-t2v-a14b"]
    for words in (
        ["sigmas=[1, 0.5]", "boundary_step=1", "solver=renoise"],
        ["num_inference_steps=10", "num_inference_steps_2=4", "flow_shift_2=5", "guidance_scale=3.5"],
    ):
        cfg = request.load([*a14b, *words]).cfg
        (place / "record.yml").write_text(json.dumps(cfg.to_json()))
        assert request.load(["record.yml"]).cfg.to_json() == cfg.to_json()


def test_defaults_of_the_experts(place: Path) -> None:
    cfg = request.load(["base.yml", "model_name=wan2.2-t2v-a14b", "num_inference_steps_2=4"]).cfg
    assert (cfg.num_inference_steps, cfg.flow_shift_2, cfg.boundary_ratio) == (40, 12.0, 0.875)
    cfg = request.load(["base.yml", "model_name=wan2.2-t2v-a14b", "boundary_step=2", "sample_steps=4"]).cfg
    assert (cfg.boundary_step, cfg.boundary_ratio, cfg.flow_shift_2) == (2, None, None)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step_1217.safetensors", "LightX2V"),
        (
            "lightx2v/Wan2.2-Lightning/Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1/low_noise_model.safetensors",
            "LightX2V",
        ),
        ("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors", "LightX2V"),
        ("some-8-step-lora.safetensors", "LightX2V"),
        ("Wan21_CausVid_14B_T2V_lora_rank32_v2.safetensors", "CausVid LoRA"),
        ("somebody/causvid/model.safetensors", "CausVid"),
        ("FastWan2.1-T2V-1.3B-Diffusers", "FastWan"),
        ("Wan21_AccVid_T2V_14B_lora_rank32_fp16.safetensors", "AccVideo"),
        ("Wan_2_1_T2V_14B_480p_rCM_lora_average_rank_83_bf16.safetensors", "rCM"),
        ("TurboWan2.1-T2V-14B-480P.safetensors", "rCM"),
        ("self_forcing_dmd.safetensors", "Self-Forcing"),
        ("Wan2.1_T2V_14B_FusionX_LoRA.safetensors", "FusionX"),
        ("wan2.1_t2v_14B_fp8_scaled.safetensors", None),
        ("style_epoch2_step1000.safetensors", None),
        ("my_lora_14steps.safetensors", None),
        ("arcminute.safetensors", None),
    ],
)
def test_families_by_name(name: str, family: str | None) -> None:
    found = few_step.family([name])
    assert (found.name if found else None) == family


def said(*words: str) -> list[str]:
    job = request.load(["base.yml", *words])
    return few_step.warnings(job, recipe_of(job))


A14B = ("model_name=wan2.2-t2v-a14b", "transformer_2_file=low_4step_lightx2v.safetensors")


def test_a_distilled_file_under_official_settings_is_warned_of(place: Path) -> None:
    tensors = {"patch_embedding.weight": np.zeros((8, 4, 1, 2, 2), np.float32)}
    write(place / "low_4step_lightx2v.safetensors", tensors)
    (warning,) = said(*A14B)
    assert warning == (
        "low_4step_lightx2v.safetensors is by its name a few-step model (LightX2V), made for few steps without "
        "guidance, but transformer_2 runs with 40 steps and flow_shift=12 and guidance; write "
        "num_inference_steps_2=4 flow_shift_2=5 guidance_scale_2=1"
    )
    (warning,) = said(*A14B, "sample_steps=4", "guidance_scale_2=1")
    assert "runs with flow_shift=12; write" in warning
    assert not said(*A14B, "sample_steps=4", "sample_shift=5", "guidance_scale=1")
    hybrid = ("sample_steps=10", "num_inference_steps_2=4", "flow_shift_2=5", "guidance_scale_2=1")
    assert not said(*A14B, *hybrid)  # the other expert is not distilled, and may be guided
    assert not said(*A14B, "sigmas=[1, 0.9, 0.8, 0.6]", "boundary_step=2", "guidance_scale_2=1")


def test_two_distilled_experts_are_told_the_words_of_one_schedule(place: Path) -> None:
    both = said("model_name=wan2.2-t2v-a14b", "ckpt_dir=somebody/Wan2.2-Lightning-Diffusers")
    assert [text.rpartition("write ")[2] for text in both] == [
        "solver=euler num_inference_steps=4 flow_shift=5 guidance_scale=1",
        "solver=euler num_inference_steps=4 flow_shift=5 guidance_scale_2=1",
    ]


def test_a_page_of_another_checkpoint_is_not_warned_of(place: Path) -> None:
    assert not said() and not said("model_name=wan2.2-t2v-a14b")


CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.skipif("lora" not in schema.KEYS, reason="the pages need the key lora")
@pytest.mark.parametrize(
    ("page", "steps"),
    [
        ("wan2.1_t2v_14b_4step", [4]),
        ("wan2.1_i2v_14b_480p_4step", [4]),
        ("wan2.2_t2v_a14b_4step", [2, 2]),
        ("wan2.2_i2v_a14b_4step", [2, 2]),
        ("wan2.2_flf2v_a14b_4step", [2, 2]),
        ("wan2.1_t2v_14b_causvid", [8]),
        ("wan2.1_t2v_14b_rcm", [4]),
    ],
)
def test_pages_run_their_files_as_these_were_distilled(page: str, steps: list[int]) -> None:
    job = request.load([str(CONFIGS / f"{page}.yml"), "plan=v6e-8"])
    recipe = recipe_of(job)
    assert [expert.stop - expert.start for expert in recipe.experts] == steps and not recipe.guided
    assert few_step.warnings(job, recipe) == []
    files = [*job.cfg.lora, *job.cfg.lora_2]
    assert len(files) == len(steps) and few_step.family(files) is not None
