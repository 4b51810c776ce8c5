"""What is described is what a run makes: the same programs, word by word, called as often."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from maxdiffusion import conditioning, parallel, request
from maxdiffusion.conditioning import text
from maxdiffusion.denoise import loop
from maxdiffusion.denoise.experts import LoadedExperts
from maxdiffusion.media.write import write
from maxdiffusion.models.clip.config import CLIPVisionConfig
from maxdiffusion.models.dit.config import AnimateConfig, DiTConfig, S2VConfig, VACEConfig
from maxdiffusion.models.umt5.config import UMT5Config
from maxdiffusion.models.vae.config import VAEConfig
from maxdiffusion.models.wav2vec2.config import Wav2Vec2Config
from maxdiffusion.parallel import axes
from maxdiffusion.programs import nbytes, programs
from maxdiffusion.request.nets import read_configs
from maxdiffusion.request.session import Session, Setup
from maxdiffusion.runtime.stages import Stages
from maxdiffusion.sampling import Sampler
from maxdiffusion.variants import get
from maxdiffusion.weights.checkpoint import Checkpoint, open_checkpoint
from maxdiffusion.weights.nets import Nets
from tests.support.sounds import tone

ROOT = Path(__file__).parents[1]
FRAMES, SIDE, FACE = 9, 32, 16
TOWER = CLIPVisionConfig(16, 32, 3, 2, patch_size=14, image_size=28)
TEXT = UMT5Config(vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
SPEECH = Wav2Vec2Config(10, 12, 24, 2, (8,) * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)
TOKENS = {"image_dim": 16, "added_kv_proj_dim": 24}
FACES = AnimateConfig(4, (("4", 4), ("8", 4), ("16", 4)), FACE, 10, 5, 14, 16, 2, 1)

# model (and what else tells it from another case) -> what its transformer adds, and words that condition it
CASES = {
    "wan2.1-t2v": ({}, ["video=VIDEO", "prompt=[a,b,c]", "loop=scan"]),
    "wan2.1-i2v": ({"in_channels": 12, **TOKENS}, ["image=[IMAGE,OTHER]", "last_image=OTHER"]),
    "wan2.2-i2v": ({"in_channels": 12}, ["image=IMAGE", "expert_residency=in_turn"]),
    "wan2.2-ti2v": ({"in_channels": 8, "out_channels": 8}, ["image=IMAGE"]),
    "wan2.1-vace": (
        {"adapter": VACEConfig((0, 1), 72)},
        ["video=VIDEO", "reference_images=[IMAGE,OTHER]", "context_window=5", "context_overlap=0"],
    ),
    "wan2.1-i2v clips": ({"in_channels": 12, **TOKENS}, ["image=[IMAGE,OTHER]", "last_image=OTHER", "clips=2"]),
    "wan2.2-i2v clips": (
        {"in_channels": 12},
        ["image=IMAGE", "expert_residency=in_turn", "clips=3", "clip_padding=reference", "overlap_frames=5"],
    ),
    "wan2.2-ti2v clips": (
        {"in_channels": 8, "out_channels": 8},
        ["extend=VIDEO", "clips=2", "overlap_frames=5", "clip_prompts=[x,y]", "prompt=a", "seed=[1,2]"],
    ),
    "wan2.1-vace clips": (
        {"adapter": VACEConfig((0, 1), 72)},
        ["clips=2", "reference_images=[IMAGE,OTHER]", "prompt=a", "seed=[1,2]"],
    ),
    "wan2.2-s2v": (
        {"adapter": S2VConfig(10, audio_layers=25, audio_inject_layers=(0,), cond_dim=4)},
        ["image=IMAGE", "audio=SOUND", "pose_video=VIDEO", "segment_frame_length=4", "prompt=a"],
    ),
    "wan2.2-animate": (
        {"in_channels": 12, "adapter": FACES, **TOKENS},
        [
            "image=IMAGE",
            "pose_video=VIDEO",
            "face_video=VIDEO",
            "segment_frame_length=5",
            "guidance_scale=2",
            "prompt=a",
        ],
    ),
}


def nets_of(model):
    """Configs of tiny nets."""
    common = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 32}
    network = DiTConfig(**common | {"in_channels": 4, "out_channels": 4, "freq_dim": 16} | CASES[model][0])
    z, patch = network.out_channels, 2 if model.startswith("wan2.2-ti2v") else None
    vae = VAEConfig((0.0,) * z, (1.0,) * z, base_dim=4, z_dim=z, num_res_blocks=1, patch_size=patch)
    every = {"text_encoder": TEXT, "image_encoder": TOWER, "audio_encoder": SPEECH}
    every |= {"transformer": network, "transformer_2": network, "vae": vae}
    return {name: every[name] for name in get(model.split()[0]).nets}


def loaded(folder, model):
    """A run of a folder that holds the files that its config names."""
    raw = dataclasses.asdict(nets_of(model)["transformer"]) | {
        "_class_name": get(model.split()[0]).task.transformer_class
    }
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(raw))
    write(np.zeros((FRAMES, FACE, FACE, 3), np.uint8), folder / "VIDEO", 16, "png", {})
    for name in ("IMAGE", "OTHER"):
        Image.new("RGB", (SIDE, SIDE)).save(folder / f"{name}.png")
    tone(folder / "SOUND", seconds=12 / 16)  # what is made of 9 frames, with 3 before them
    words = CASES[model][1] if any("prompt" in word for word in CASES[model][1]) else [*CASES[model][1], "prompt=[a,b]"]
    for name in ("IMAGE.png", "OTHER.png", "VIDEO", "SOUND"):
        words = [word.replace(name.removesuffix(".png"), str(folder / name)) for word in words]
    (folder / "run.yml").write_text("# all keys are given as words\n")
    side = SIDE * 2 if "s2v" in model else SIDE
    common = [
        f"width={side}",
        f"height={side}",
        f"num_frames={FRAMES}",
        "num_inference_steps=4",
        f"output_dir={folder}",
        "jax_cache_dir=",
    ]
    mesh = ["attention=ulysses", "ici_data_parallelism=2", "guidance_mode=batched"]
    named = [f"model_name={model.split()[0]}", f"pretrained_model_name_or_path={folder}"]
    return request.load([str(folder / "run.yml"), *named, *common, *mesh, *words])


class Zeros(Nets):
    """Nets without a checkpoint, whose parameters are zeros, each on its devices."""

    def __init__(self, setup):
        self.setup = setup
        self.checkpoint = Checkpoint(ROOT / "models" / "wan_tiny", {})

    def nbytes_on_disk(self, name):
        return 0

    def load(self, name, on_tensor):
        graph, leaves = nnx.split(self.setup.abstract(name))
        zeros = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), leaves)
        return nnx.merge(graph, zeros)


class Spy:
    """In place of `parallel.jit`: notes each program as it is called, and computes nothing unless told to."""

    def __init__(self, compute):
        self.real, self.compute, self.calls = parallel.jit, compute, collections.Counter()

    def __call__(self, function, *args, **kwargs):
        return Noted(self, self.real(function, *args, **kwargs))

    def run(self, lowered, execute):
        self.calls[lowered.as_text()] += 1
        if self.compute:
            return execute()
        everywhere = parallel.current().sharding()
        return jax.tree.map(
            lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding or everywhere), lowered.out_info
        )


class Noted:
    def __init__(self, spy, jitted):
        self.spy, self.jitted = spy, jitted

    def __call__(self, *args):
        return self.spy.run(self.jitted.lower(*args), lambda: self.jitted(*args))

    def lower(self, *args):
        return NotedLowered(self.spy, self.jitted.lower(*args))


class NotedLowered(jax.stages.Lowered):
    def __init__(self, spy, lowered):
        self.spy, self.lowered = spy, lowered

    @property
    def out_info(self):
        return self.lowered.out_info

    def compile(self):
        return NotedCompiled(self)


class NotedCompiled(jax.stages.Compiled):
    def __init__(self, noted):
        self.noted, self.compiled = noted, noted.lowered.compile() if noted.spy.compute else None

    def __call__(self, *args):
        return self.noted.spy.run(self.noted.lowered, lambda: self.compiled(*args))


@pytest.mark.parametrize("compute", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", CASES)
def test_a_run_calls_the_programs_that_are_described(model, compute, tmp_path, monkeypatch):
    setup = Setup.of(loaded(tmp_path, model), nets_of(model), jax.devices()[:4])
    monkeypatch.setattr(text, "BUCKET", text.MAX_LENGTH)  # the longest is what is described
    described = list(programs(setup))
    want = collections.Counter()
    for program in described:
        want[program.lowered.as_text()] += program.times

    s = Session(setup, Zeros(setup), Stages("off"))
    spy = Spy(compute)
    for module in (parallel, loop):
        monkeypatch.setattr(module, "jit", spy)
    with parallel.use(setup.placement):
        inputs = conditioning.read(s.job)
        sampler = Sampler(s, conditioning.encode(s, inputs))
        experts = LoadedExperts(s.load, s.job.cfg.expert_residency)
        for work in sampler.order():
            latents = sampler.advance(work, experts)
            if latents is not None:
                decode = conditioning.decoding(s, s.load("vae"), inputs, sampler.videos(work))
                list(s.job.segments.decode(decode, latents))
    names = {program.lowered.as_text(): f"{program.name} {program.times}" for program in described}
    missing = [names[program] for program in want if spy.calls[program] != want[program]]
    assert not missing
    others = [program for program in spy.calls if program not in want]  # noise, and latents from it: small ones
    assert all(re.search(r"@jit_(init|_noise) ", program.split("\n", 1)[0]) for program in others)


def test_what_lives_beside_a_program(tmp_path):
    job, configs, devices = loaded(tmp_path, "wan2.2-i2v"), nets_of("wan2.2-i2v"), jax.devices()[:4]

    def resident(**keys):
        changed = request.job_of(job.cfg.model_copy(update=keys))
        return {program.name: program.resident for program in programs(Setup.of(changed, configs, devices))}

    together = {"expert_residency": "together"}
    one, both, more, most = (
        resident(**keys) for keys in ({}, together, {"prompt": ("a", "b", "c")}, together | {"prompt": ("a", "b", "c")})
    )
    weights = nbytes(nnx.state(Setup.of(job, configs, devices).abstract("transformer")))
    assert both["prepare"] - one["prepare"] == weights
    assert both["decode"] == one["decode"]  # no transformer is kept when the only batch is decoded
    assert more["decode"] - one["decode"] == weights and most["decode"] - one["decode"] == 2 * weights
    assert one["text"] == both["text"] == 0


def test_a_checkpoint_at_hand_wins_over_the_official_one():
    job = request.load([str(ROOT / "configs" / "wan_tiny.yml")])
    assert read_configs(job) == open_checkpoint(ROOT / "models" / "wan_tiny").configs


def test_bytes_per_device():
    mesh = parallel.make_mesh(parallel.Degrees(context=8))
    with parallel.use(parallel.Placement(mesh, parallel.rules_for())):
        split, whole = (parallel.like((2, size), np.float32, None, axes.SEQUENCE) for size in (16, 15))
    assert nbytes([split, whole]) == 2 * 2 * 4 + 2 * 15 * 4
