"""Every config page at its full size, without weights: what it denoises with is lowered, nothing is allocated."""

from pathlib import Path

import jax
import pytest

from maxdiffusion import request, variants
from maxdiffusion.programs import programs
from maxdiffusion.request.nets import read_configs
from maxdiffusion.request.session import Setup

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.stem for path in (ROOT / "configs").glob("*.yml"))
GIVEN = {
    "I2V": ("image=a", "width=1280", "height=720"),
    "FLF2V": ("image=a", "last_image=a", "width=1280", "height=720"),
    "S2V": ("image=a", "audio=a", "num_frames=77", "width=1024", "height=704"),
    "ANIMATE2": ("image=a", "driving_video=.", "num_frames=81", "width=640", "height=800"),
    "ANIMATE": ("image=a", "pose_video=.", "face_video=.", "num_frames=77", "width=1280", "height=720"),
}


def of_page(page: str, *words: str, kinds=("prepare", "step")):
    """The programs of a page on one device."""
    path = str(ROOT / "configs" / f"{page}.yml")
    kinds_of = ("FLF2V", "TI2V", "I2V", "S2V", "ANIMATE2", "ANIMATE", "T2V")
    kind = next(kind for kind in kinds_of if kind.lower() in page or kind == "T2V")
    job = request.load([path, *(["prompt=a"] if page != "wan_tiny" else []), *GIVEN.get(kind, ()), *words])
    made = [each for each in programs(Setup.of(job, read_configs(job), jax.devices()[:1])) if each.name in kinds]
    return job.cfg, made


@pytest.mark.parametrize("page", PAGES)
def test_the_denoise_step_lowers(page):
    cfg, (prepare, step) = of_page(page)
    spec = variants.get(cfg.model_name)
    assert step.times == cfg.num_inference_steps
    assert prepare.times == (2 if cfg.guidance_scale > 1 else 1) * (2 if spec.boundary_ratio else 1)
    *_, h, w, c = step.lowered.out_info.solver.x.shape
    assert (h, w, c) == ((cfg.height // 16, cfg.width // 16, 48) if c == 48 else (cfg.height // 8, cfg.width // 8, c))


@pytest.mark.slow
def test_timesteps_by_token():
    """The page alone has no image."""
    _, (_, step) = of_page("wan2.2_ti2v_5b", "image=a", "width=1280", "height=704")
    (_, contexts, *_), _ = step.lowered.in_avals
    assert contexts.positive.frames.first.shape == (1, 1, 44, 80, 48)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_program_lowers(page):
    _, made = of_page(page, kinds=("image", "encode", "text", "decode"))
    for program in made:
        assert program.lowered.as_text() and program.times >= 1
