"""A plan by arithmetic, for what is not compiled: weights, activations and a roofline.

The cost of self-attention is `attention.auto`'s. What else is done is counted as matrix products and as passes over
activations, with the factors below, which were fitted to compiled programs of the official models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from maxdiffusion.attention import auto
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.config import Config, parts
from maxdiffusion.config.examples import examples
from maxdiffusion.denoise.experts import guided
from maxdiffusion.denoise.guidance import BATCHED_TOKENS
from maxdiffusion.hardware import links
from maxdiffusion.hardware.chips import KINDS
from maxdiffusion.parallel import startup
from maxdiffusion.planning import programs
from maxdiffusion.planning.results import Program, Seconds, Split, Stage
from maxdiffusion.weights.nets import builders_of

GIB = 2**30
_RANGE = (0.8, 1.4)  # of modelled seconds
_EFFICIENCY = 0.75  # of peak, of matrix products
_ALIVE = 17  # activations that are in memory at once, of tokens x model dim
_PASSES = 80  # over such activations in a layer
_LAYOUTS = 3.5  # what layouts and merges take of the attention's rule
_VAE_ALIVE = 5300  # bytes in memory for a pixel of a chunk of 4 frames
_VAE_WORK = 0.13  # FLOP for a pixel of a frame and a byte of weights, at 0.3 of peak
_TEXT = 512  # tokens of a prompt


def nbytes(cfg: Config, configs: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of each net's weights."""
    build = builders_of(cfg, AttentionPlan())
    return {name: programs.nbytes(nnx.state(build[name](config))) for name, config in configs.items()}


def work_of(cfg: Config, configs: Mapping[str, Any], kind: str, platform: str) -> auto.Work:
    """One layer's self-attention for the largest of a run's videos."""
    network = configs["transformer"]
    tokens = startup.most_tokens(cfg, network)
    branches = 2 if any(guided(cfg.boundary_ratio, cfg.guidance_scale, cfg.guidance_scale_2)) else 1
    return auto.Work(tokens, network.attention_head_dim, branches, kind, platform)


@dataclasses.dataclass(frozen=True)
class Model:
    """A run in numbers.

    Attributes:
      work: one layer's self-attention.
      peak: FLOP/s of a device.
      layers: of the transformer.
      width: its values of a token.
      itemsize: bytes of one of them.
      weight: bytes of a weight.
      nbytes: of each net's weights, by folder.
      together: transformers that are in memory together.
      videos: of the run.
      batch: of them, how many a device of the data axis makes at once.
      mode: `guidance_mode`.
      batched: whether both branches of guidance share a batch on one device.
      segments: parts of a video that are made one after another.
      pixels: of a part, all frames, as the VAE's convolutions see them.
      frames: of a part.
      steps: to denoise a part.
      prompts: that are encoded.
    """

    work: auto.Work
    peak: float
    layers: int
    width: int
    itemsize: int
    weight: int
    nbytes: Mapping[str, int]
    together: int
    videos: int
    batch: int
    mode: str
    batched: bool
    segments: int
    pixels: int
    frames: int
    steps: int
    prompts: int

    @classmethod
    def of(cls, cfg: Config, configs: Mapping[str, Any], nbytes: Mapping[str, int], kind: str, platform: str) -> Model:
        """Of a run on devices of that kind, for the largest of its videos."""
        cut, network, vae = parts.of(cfg), configs["transformer"], configs["vae"]
        videos, rows = examples(cfg), cfg.per_device_batch_size
        work = work_of(cfg, configs, kind, platform)
        both = 2 * rows * work.tokens <= BATCHED_TOKENS
        return cls(
            work=work,
            peak=KINDS[kind].peak if kind in KINDS else 2 * auto.PLATFORMS[platform].attention,
            layers=network.num_layers,
            width=network.num_attention_heads * network.attention_head_dim,
            itemsize=4 if cfg.activations_dtype == "float32" else 2,
            weight=4 if cfg.weights_dtype == "float32" else 2,
            nbytes=nbytes,
            together=2 if "transformer_2" in configs and cfg.expert_residency == "together" else 1,
            videos=len(videos),
            batch=rows,
            mode=cfg.guidance_mode,
            batched=cfg.guidance_mode == "batched" or (cfg.guidance_mode == "auto" and both),
            segments=len(cut.starts),
            pixels=cut.length * max(video.height * video.width for video in videos) // (vae.patch_size or 1) ** 2,
            frames=cut.length,
            steps=cfg.num_inference_steps,
            prompts=len({text for video in videos for text in (video.prompt, video.negative_prompt)[: work.branches]}),
        )

    def units(self, data: int) -> int:
        """How many batches the run makes, of all segments."""
        return -(-self.videos // (self.batch * data)) * self.segments

    def stages(self, split: Split, plan: AttentionPlan, gib: float) -> dict[str, Stage]:
        """What the three stages need and take on a split of devices that have `gib` each."""
        programs = {"text": self._text(split), "denoise": self._step(split, plan), "decode": self._decode(split)}
        return {name: Stage("modelled", (each,), each.gib <= gib) for name, each in programs.items()}

    def gathering(self, net: str, split: Split) -> float:
        """Seconds in which every device gets the net's weights, where they are spread."""
        machine, size = self.machine, self.nbytes[net] // split.tensor
        chips = -(-split.holders // machine.cores)
        return links.all_gather(size, split.holders, chips, machine)

    @property
    def machine(self) -> Any:
        kind = self.work.device_kind
        return KINDS[kind].machine if kind in KINDS else auto.PLATFORMS[self.work.platform]

    def transformers(self, split: Split) -> float:
        """GiB on each device of what denoising holds of transformers; of spread ones two layers are whole."""
        layers = 2 / self.layers if split.holders > 1 else 0.0
        return (self.together / split.holders + layers) * self.nbytes["transformer"] / split.tensor / GIB

    def text_encoder(self, split: Split) -> float:
        """GiB on each device of the text encoder."""
        return self.nbytes["text_encoder"] / (split.holders * split.tensor) / GIB

    def _text(self, split: Split) -> Program:
        held = self.text_encoder(split)
        flops = self.nbytes["text_encoder"] * _TEXT  # two of each weight, which has two bytes
        seconds = _seconds(linear=flops / self.peak, other=held * GIB / self.machine.memory)
        return Program("text", self.prompts, held + 0.3, seconds)

    def _step(self, split: Split, plan: AttentionPlan) -> Program:
        rows = self.batch * self.branches(split)
        examples = -(-rows // split.data)
        cost = auto.cost(plan, split.data, dataclasses.replace(self.work, branches=rows))
        tokens = examples * -(-self.work.tokens // split.context)
        nbytes = tokens * self.width // split.tensor * self.itemsize
        products = 2 * tokens * self.nbytes["transformer"] / self.weight / split.tensor
        once = _seconds(
            attention=self.layers * cost.compute,
            linear=products / (_EFFICIENCY * self.peak),
            other=self.layers * (_LAYOUTS * cost.passes + _PASSES * nbytes / self.machine.memory),
            exposed=self.layers * (cost.exchange + cost.rotation) + self.gathering("transformer", split),
        )
        gib = self.transformers(split) + _ALIVE * nbytes / GIB
        passes = self.batch * self.work.branches // rows
        return Program("step", self.steps * self.units(split.data), gib, once * passes)

    def _decode(self, split: Split) -> Program:
        pixels = self.batch * self.pixels / split.context
        work = _VAE_WORK * self.nbytes["vae"] * pixels
        gib = self.nbytes["vae"] / GIB + _VAE_ALIVE * 4 * pixels / self.frames / GIB
        return Program("decode", self.units(split.data), gib, _seconds(linear=work / (0.3 * self.peak)))

    def branches(self, split: Split) -> int:
        """How many share a batch: both where a device has but one of them, or where `guidance_mode` says so."""
        several = self.batched or (self.mode == "auto" and split.data > 1)
        return self.work.branches if several else 1


def _seconds(**parts: float) -> Seconds:
    total = sum(parts.values())
    return Seconds(**parts, low=_RANGE[0] * total, high=_RANGE[1] * total)


def timed(stage: Stage, modelled: Stage) -> Stage:
    """A stage that a compiler without a count of cycles has compiled, with modelled seconds."""
    (model,) = modelled.programs
    calls = max(1, sum(each.times for each in stage.programs if each.name == model.name))
    each_call = modelled.seconds * (1 / calls)
    programs = [
        dataclasses.replace(each, seconds=each_call) if each.name == model.name else each for each in stage.programs
    ]
    return dataclasses.replace(stage, programs=tuple(programs))


def twin(name: str, stage: Stage, model: Model, given: Split, wanted: Split, gib: float) -> Stage:
    """Stage `name` of `wanted` from the compiled one of `given`, from which it differs in its weights alone."""
    net, step = {"text": ("text_encoder", "text"), "denoise": ("transformer", "step")}[name]
    held = model.transformers if name == "denoise" else model.text_encoder
    more = held(wanted) - held(given)
    seconds = model.gathering(net, wanted) - model.gathering(net, given)

    def changed(each: Program) -> Program:
        took = each.seconds
        if each.name == step:
            took = dataclasses.replace(
                took,
                exposed=max(0.0, took.exposed + seconds),
                low=took.low + seconds,
                high=took.high + (2 if seconds > 0 else 1) * seconds,
            )
        return dataclasses.replace(each, gib=each.gib + more, seconds=took)

    programs = tuple(map(changed, stage.programs))
    return Stage("derived", programs, all(each.gib <= gib for each in programs))
