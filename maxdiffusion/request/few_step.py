"""Few-step models: the recipe that a checkpoint asks for, and what the names of files say about theirs.

The recipes are the authors': https://github.com/hao-ai-lab/FastVideo, https://github.com/ModelTC/LightX2V,
https://github.com/NVlabs/FastGen, https://github.com/NVlabs/rcm, https://github.com/tianweiy/CausVid.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from maxdiffusion.errors import UserError
from maxdiffusion.request.job import Job
from maxdiffusion.variants import FEW_STEP_PIPELINES

if TYPE_CHECKING:
    from maxdiffusion.denoise.recipe import Recipe

KEYS = ("solver", "sigmas", "guidance_scale")  # that a checkpoint may ask for

Asked = tuple[tuple[float, ...], str, float]  # timesteps, solver, guidance scale
_DMD: Asked = ((1000.0, 757.0, 522.0), "renoise", 1.0)  # of every FastWan model; their model_index.json names none
_DMD2_SOLVERS = {"ode": "euler", "sde": "renoise"}


def asked(model_index: Mapping[str, Any], where: str) -> dict[str, tuple[Any, str]]:
    """The keys that a checkpoint asks for: key -> (value, origin); empty for a model of many steps.

    A `dmd2_config` block (FastGen) names steps or timesteps, solver and guidance scale; the class WanDMDPipeline
    (FastWan) stands for three steps of `renoise` without guidance.

    Args:
      model_index: content of model_index.json; empty where there is none.
      where: the checkpoint, for origins and errors.

    Raises:
      UserError: the block has a value that cannot be used.
    """
    block, name = model_index.get("dmd2_config"), model_index.get("_class_name")
    if block is None:
        if name not in FEW_STEP_PIPELINES:
            return {}
        origin = f"{where} is a {name}"
        timesteps, solver, scale = _DMD
    else:
        origin = f"dmd2_config of {where}"
        timesteps, solver, scale = _dmd2(block, origin)
    values = (solver, [str(timestep / 1000) for timestep in timesteps], scale)
    return {key: (value, origin) for key, value in zip(KEYS, values, strict=True)}


def _dmd2(block: Any, where: str) -> Asked:
    """Timesteps, solver and guidance scale of the block; the defaults are FastGen's."""
    if not isinstance(block, Mapping):
        raise UserError(f"{where} is {block!r}; it must be an object, such as {{'num_inference_steps': 4}}.")
    solver, scale = block.get("solver", "ode"), block.get("guidance_scale", 1.0)
    count, timesteps = block.get("num_inference_steps"), block.get("denoising_timesteps")
    if solver not in _DMD2_SOLVERS:
        raise UserError(f"{where} has the solver {solver!r}; it must be {' or '.join(_DMD2_SOLVERS)}.")
    if not isinstance(scale, int | float) or scale < 1:
        raise UserError(f"{where} has the guidance_scale {scale!r}; it must be a number from 1 up.")
    if timesteps is None:
        count = 4 if count is None else count
        if not isinstance(count, int) or not 1 <= count <= 1000:
            raise UserError(f"{where} has {count!r} num_inference_steps; it must be a number from 1 to 1000.")
        timesteps = [999 * (count - i) // count for i in range(count)]
    numbers = isinstance(timesteps, list) and all(isinstance(t, int | float) and 0 < t <= 1000 for t in timesteps)
    if not numbers or not timesteps or (count is not None and len(timesteps) != count):
        raise UserError(
            f"{where} has the denoising_timesteps {timesteps!r}; they must be numbers above 0 and up to 1000, as many "
            "as num_inference_steps."
        )
    return tuple(map(float, timesteps)), _DMD2_SOLVERS[solver], float(scale)


@dataclasses.dataclass(frozen=True)
class Family:
    """Models distilled alike.

    Attributes:
      name: as their authors call them.
      pattern: of their files' names, in lower case.
      steps: the most that are of use.
      shifts: the least and the largest flow shift that are of use; None where the noise levels are explicit.
      keys: the words to write, besides guidance.
    """

    name: str
    pattern: str
    steps: int
    shifts: tuple[float, float] | None
    keys: str


# The first whose pattern is found decides: names of the last ones are in names of the others.
FAMILIES = (
    Family("FastWan", r"fast_?wan", 4, None, "solver=renoise sigmas='[1, 0.757, 0.522]'"),
    Family("Self-Forcing", r"self.?forcing", 4, None, "solver=renoise sigmas='[1, 0.9375, 0.83333, 0.625]'"),
    Family(
        "rCM",
        r"(?<![a-z])rcm(?![a-z])|turbo.?(wan|diffusion)",
        8,
        None,
        "solver=renoise sigmas='[0.98765, 0.93378, 0.8529, 0.60898]'",
    ),
    Family("CausVid LoRA", r"causvid.*lora", 12, (5.0, 8.0), "num_inference_steps=8 flow_shift=8"),
    Family("CausVid", r"causvid", 12, None, "solver=renoise sigmas='[1, 0.757, 0.522]'"),
    Family("AccVideo", r"accvid", 12, (3.0, 8.0), "solver=euler num_inference_steps=10 flow_shift=5"),
    Family("FusionX", r"fusion.?x", 12, (1.0, 8.0), "num_inference_steps=8 flow_shift=5"),
    Family(
        "LightX2V",
        r"lightx2v|lightning|distill|(?<!\d)[1-8]-?steps?(?![a-z\d])",  # not epoch2_step100
        12,
        (3.0, 8.0),
        "solver=euler num_inference_steps=4 flow_shift=5",
    ),
)


def family(names: Iterable[str]) -> Family | None:
    """The family of files with these names, paths or hub locations; None where no name is that of a few-step model."""
    texts = ["/".join(re.split(r"[/\\]", name)[-2:]).lower() for name in names]  # the folder names some files
    return next((each for each in FAMILIES if any(re.search(each.pattern, text) for text in texts)), None)


def warnings(job: Job, recipe: Recipe) -> list[str]:
    """A sentence for each expert whose file is by its name a few-step model and whose steps are not those of one."""
    experts = dict.fromkeys((expert.net, expert.guided) for expert in recipe.experts)
    return [text for expert in experts if (text := _warning(job, *expert))]


def _warning(job: Job, net: str, guided: bool) -> str:
    cfg, second = job.cfg, "_2" if net == "transformer_2" else ""
    names = _names(job, net)
    found = family(names)
    if found is None:
        return ""
    steps = cfg.num_inference_steps_2 if second and cfg.num_inference_steps_2 else cfg.num_inference_steps
    shift = cfg.flow_shift_2 if second and cfg.flow_shift_2 else cfg.flow_shift
    keys, (least, most) = found.keys, found.shifts or (0.0, 0.0)
    if found.name == "LightX2V" and "last_image" in job.spec.task.takes:  # shift 16 between two images
        most = 16.0
        if job.spec.task.two_images or any(video.last_image for video in job.videos):
            keys = keys.replace("flow_shift=5", "flow_shift=16")
    if second and family(_names(job, "transformer")) is None:  # steps of its own: the other expert is not distilled
        keys = re.sub("(num_inference_steps|flow_shift)=", r"\1_2=", keys).removeprefix("solver=euler ")
    faults = [
        f"{steps} steps" if steps > found.steps else "",
        f"flow_shift={shift:g}" if not cfg.sigmas and not least <= shift <= most else "",
        "guidance" if guided else "",
    ]
    if not any(faults):
        return ""
    which = next(name for name in names if family([name]))
    return (
        f"{which} is by its name a few-step model ({found.name}), made for few steps without guidance, but {net} runs "
        f"with {' and '.join(filter(None, faults))}; write {keys} guidance_scale{second}=1"
    )


def _names(job: Job, net: str) -> list[str]:
    """The names of the files that one expert is made of, and of the checkpoint."""
    keys = (f"{net}_file", "lora_2" if net == "transformer_2" else "lora")
    given = [getattr(job.cfg, key) for key in keys]
    names = [name for value in given if value for name in ([value] if isinstance(value, str) else value)]
    return [*names, job.cfg.pretrained_model_name_or_path.rstrip("/").rpartition("/")[2]]
