"""One answer to which experts are guided: in the mesh, the plan, the loop and the list of programs."""

import dataclasses
import itertools
from pathlib import Path

import jax
import pytest

from maxdiffusion import parallel, request
from maxdiffusion.denoise.experts import program_calls
from maxdiffusion.denoise.guidance import BatchedGuidance
from maxdiffusion.planning.splits import splits
from maxdiffusion.programs import BatchPrograms, programs
from maxdiffusion.request import cost
from maxdiffusion.request.nets import read_configs
from maxdiffusion.request.session import Setup

PAGE = Path(__file__).parents[2] / "configs" / "wan2.2_t2v_a14b.yml"


@pytest.mark.parametrize("scales", list(itertools.product((1, 3), repeat=2)))
@pytest.mark.parametrize("link", [1e7, 1e10])
def test_mesh_plan_loop_and_programs_agree_on_the_branches_of_every_expert(scales, link, monkeypatch):
    """Where links are slow a guidance pair takes two devices of the data axis."""
    monkeypatch.setattr(cost, "SPEEDS", {"cpu": dataclasses.replace(cost.SPEEDS["cpu"], link=link)})
    guided = [scale > 1 for scale in scales]
    words = [f"{key}={scale}" for key, scale in zip(("guidance_scale", "guidance_scale_2"), scales, strict=True)]
    job = request.load([str(PAGE), "prompt=a", *words])
    setup = Setup.of(job, read_configs(job), jax.devices()[:8])
    run = cost.Run.of(job, setup.recipe, setup.configs, "cpu", "cpu")
    assert [expert.guided for expert in run.experts] == guided

    legal, _ = splits(run, 8)
    assert {layout.data for layout in legal.values()} == ({1, 2} if any(guided) else {1})
    layout = min((each for each in legal.values() if not each.sharded), key=run.seconds)
    assert setup.placement.mesh.shape["data"] == layout.data
    assert (setup.plan.ring, setup.plan.ulysses) == (layout.attention.ring, layout.attention.ulysses)
    if all(guided) or not any(guided):
        assert layout.data == (2 if all(guided) and link < 1e10 else 1)

    with parallel.use(setup.placement):
        shared = isinstance(BatchPrograms(setup, job.videos[0], 1).denoiser.guidance, BatchedGuidance)
    passes = [run.passes(expert, layout)[0] for expert in run.experts]
    assert passes == [2 if pair and not shared else 1 for pair in guided]

    calls = program_calls(setup.recipe.experts, steps=1)
    found = {
        name: [each.times for each in programs(setup) if each.name == name] for name in ("prepare", "step", "text")
    }
    assert found["step"] == list(calls.values()) and sum(calls.values()) == run.steps
    assert {pair for pair, _ in calls} == set(guided)
    for pair in set(guided):
        assert calls[pair, 1] == sum(expert.steps for expert in run.experts if expert.guided == pair)
    assert found["prepare"] == [2 + sum(guided)] and found["text"] == [1 + any(guided)]
