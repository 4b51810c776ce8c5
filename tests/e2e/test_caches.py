"""Step caches through the entry page: the steps and latents of diffusers' hooks on a tiny random pipeline."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers.hooks import HookRegistry

from maxdiffusion import generate_wan
from maxdiffusion.errors import UserError
from maxdiffusion.request import load
from maxdiffusion.weights.latents_io import load_latents, save_latents
from tests.support.videos import CONFIGS

PROMPT, STEPS, SIZE, FRAMES = "a green square moving left on a black background", 12, 32, 9
RATIOS = [1.0, 1.02, 0.99, 0.98, 0.99, 0.97, 0.98, 0.97, 0.95, 0.96, 0.9, 0.8]


def theirs(checkpoint, noise, config):
    """The latents, and the steps at which the last block of the trunk ran, of the prompt and the negative prompt."""
    pipeline = diffusers.WanPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    seen: list[tuple[str, int]] = []
    transformer, step = pipeline.transformer, [0]

    def ran(*_):
        state = HookRegistry.check_if_exists_or_initialize(transformer)
        seen.append((state.branch, step[0]))

    real = transformer.cache_context

    def context(name, **about):
        HookRegistry.check_if_exists_or_initialize(transformer).branch = name
        return real(name, **about)

    transformer.cache_context = context
    transformer.blocks[-1].ffn.register_forward_hook(ran)  # below the hooks, which replace a block's forward
    transformer.enable_cache(config)

    def counted(pipe, i, t, kwargs):
        step[0] = i + 1
        return kwargs

    latents = pipeline(
        PROMPT,
        negative_prompt="blurry",
        height=SIZE,
        width=SIZE,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        latents=torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy()),
        output_type="latent",
        callback_on_step_end=counted,
    ).frames
    computed = {key: [i + 1 for name, i in seen if name == branch] for key, branch in _BRANCHES.items()}
    return pipeline.scheduler.config.flow_shift, latents.numpy().transpose(0, 2, 3, 4, 1), computed


_BRANCHES = {"prompt": "cond", "negative_prompt": "uncond"}


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("noise") / "noise.safetensors"
    drawn = rng.standard_normal((1, (FRAMES - 1) // 4 + 1, SIZE // 8, SIZE // 8, 16), np.float32)
    save_latents(path, drawn, {})
    return drawn, path


def ours(folder, checkpoint, noise, shift, *words):
    (folder / "run.yml").write_text("# all keys are given as words\n")
    job = load(
        [
            str(folder / "run.yml"),
            "model_name=wan2.1-t2v",
            "conventions=diffusers",
            f"pretrained_model_name_or_path={checkpoint}",
            f"prompt={PROMPT}",
            "negative_prompt=blurry",
            f"height={SIZE}",
            f"width={SIZE}",
            f"num_frames={FRAMES}",
            f"num_inference_steps={STEPS}",
            "guidance_scale=4",
            f"flow_shift={shift}",
            f"initial_latents={noise}",
            f"save_file={folder / 'ours.npy'}",
            "weights_dtype=float32",
            "activations_dtype=float32",
            "text_encoder_dtype=float32",
            "jax_cache_dir=",
            "log_level=error",
            "contact_sheet=0",
            *words,
        ]
    )
    generate_wan.run(job)
    record = json.loads((folder / "ours.json").read_text())
    return load_latents(folder / "ours.latents.safetensors")[0], record.get("cache")


def cases():
    hooks = diffusers.hooks
    mag = hooks.MagCacheConfig(0.06, 2, 0.2, STEPS, RATIOS)
    taylor = hooks.TaylorSeerCacheConfig(3, 3, None, 1, torch.float32, use_lite_mode=True)
    words = ("cache=mag", "cache_threshold=0.06", "cache_max_skips=2")
    yield pytest.param("mag", mag, words, marks=pytest.mark.slow)
    yield pytest.param("taylor", taylor, ("cache=taylor", "cache_max_skips=2"), marks=pytest.mark.slow)
    words = ("cache=first_block", "cache_threshold=0.6")
    yield pytest.param("first_block", hooks.FirstBlockCacheConfig(0.6), words, marks=pytest.mark.slow)
    yield "sea", hooks.SeaCacheConfig(0.6), ("cache=sea", "cache_threshold=0.6")


@pytest.mark.parametrize(("name", "config", "words"), cases())
def test_steps_and_latents_are_those_of_the_reference(tmp_path, random_checkpoint, noise, name, config, words):
    """Over all devices there are, so that some tokens are padding."""
    drawn, path = noise
    shift, wanted, steps = theirs(random_checkpoint, drawn, config)
    if name == "mag":
        (tmp_path / "ratios.json").write_text(json.dumps({"ratios": RATIOS}))
        words = (*words, f"cache_ratios={tmp_path / 'ratios.json'}")
    found, record = ours(tmp_path, random_checkpoint, path, shift, *words)
    print(name, steps, np.abs(found - wanted).max())
    assert 1 < len(steps["prompt"]) < STEPS, "the reference leaves some steps out"
    assert record == {"name": name, "computed": [steps]}
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("cache=sea", "num_inference_steps=4"), "few-step"),
        (("cache=mag",), "no published ratios"),
        (("cache=taylor", "cache_threshold=1"), "not used by cache=taylor"),
        (("cache_threshold=1",), "only used with"),
        (("cache=sea", "calibrate_cache=x.json"), "leave one"),
        (("cache=mag", "cache_ratios=absent.json"), "cannot be read"),
        (("cache=spectrum", "cache_psnr=40"), "not used by cache=spectrum, but by mag or sea or first_block"),
        (("cache=sea", "cache_psnr=40", "cache_threshold=1"), "leave one"),
        (("cache=sea", "cache_psnr=40", "loop=scan"), "single steps"),
        (("cache=sea", "cache_psnr=40", "verify=true"), "verify=true"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        load([str(CONFIGS / "wan_tiny.yml"), "prompt=x", f"output_dir={tmp_path}", *words])
