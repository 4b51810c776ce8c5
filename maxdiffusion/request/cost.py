"""Predicted seconds and memory of a run on a split of the devices, for the choice at startup and for plans.

Arithmetic from the nets' sizes and public figures of chips and links (`hardware`); nothing was timed. Its factors were
fitted to compiled programs of the official models, see tests/request/test_cost.py.

Self-attention of one layer:

    ring x hop + (ring - 1) x (merge + max(0, rotation - hop)) + 4 all-to-alls and their copies

  hop         4 x examples x heads x queries x keys x head_dim / rate, queries and keys padded to the kernel's blocks
  merge       two results into one: 11 bytes per value / rate of merging; by a kernel that merges, what it reads
              and writes beside: 8 bytes per value / memory bandwidth
  rotation    a device's k and v over the link to the next ring shard
  all-to-all  of a device's share of q, k, v or the output; their copies: 16 bytes per value / memory bandwidth

A pass of the network adds its matrix products, passes over the activations and the gathers of spread weights; the run
adds the text encoder and the VAE, which splits the width of the picture over the context axis. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from maxdiffusion.attention.block_sizes import blocks, flash_blocks
from maxdiffusion.attention.kernels import KERNELS
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.errors import UserError
from maxdiffusion.hardware import links, quantization
from maxdiffusion.hardware.chips import GENERATIONS, KINDS, DeviceSpeed
from maxdiffusion.request.job import Job
from maxdiffusion.request.nets import builders

if TYPE_CHECKING:
    from maxdiffusion.denoise.recipe import Recipe
    from maxdiffusion.models.dit.config import DiTConfig

log = logging.getLogger(__name__)

GIB = 2**30
TEXT = 512  # tokens of a prompt
RANGE = (0.8, 1.4)  # factors of predicted seconds

# Fitted.
_PRODUCTS = 0.85  # fraction of peak of matrix products, convolutions
_LINEAR = 1.1  # the same of a pass, by all of its weights, a seventh of which are of the text's keys and values
_PASSES = 24  # over activations of tokens x model dim in a layer
_MERGE = 11  # bytes per value of a further hop
_MERGED = 8  # the same where the kernel merges, with the shorter blocks of keys
_SWAPS = 16  # bytes per value of all-to-alls: two axes swapped on the side that has all tokens
_EXPOSED = 0.5  # fraction of all-to-alls not hidden by products
_GATHERING = 0.1  # exposed fraction of weight gathers
_ALIVE = 8.5  # activations of tokens x model dim in memory at once
_TURNING = 4  # more of them in a ring: rotating keys and values, two results
_WHOLE = 1.5  # layers of spread weights that are gathered at a time
_VAE_ALIVE = (2200, 775)  # bytes in memory for a pixel of a chunk of 4 frames, and more for each byte of a value
_VAE_WORK = 0.33  # FLOP for a pixel of a frame and a weight
_VAE_BYTES = 200_000  # read and written for a pixel of a frame, in either dtype

# Modelled speeds of devices that are not in `KINDS`, by platform; of an unknown TPU those of v6e.
SPEEDS: Mapping[str, DeviceSpeed] = MappingProxyType(
    {
        "cpu": DeviceSpeed(0.2e12, 0.2e12, 0.1e12, 20e9, 10e9, 5e9),
        "gpu": DeviceSpeed(800e12, 800e12, 400e12, 3000e9, 400e9, 750e9),
        "tpu": GENERATIONS["v6e"].speed,
    }
)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Predicted seconds: parts that add up, the collectives hidden beside them, and the range of the sum."""

    attention: float = 0.0
    linear: float = 0.0
    other: float = 0.0
    exposed: float = 0.0
    hidden: float = 0.0
    low: float = 0.0
    high: float = 0.0

    @property
    def total(self) -> float:
        return self.attention + self.linear + self.other + self.exposed

    def __add__(self, more: Seconds) -> Seconds:
        return Seconds(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(more), strict=True)))

    def __mul__(self, times: float | int) -> Seconds:
        return Seconds(*(times * value for value in dataclasses.astuple(self)))


class Figures(NamedTuple):
    """Figures of one program of a run.

    Attributes:
      name: of the program, see `programs.Program`.
      times: calls in a run.
      gib: GiB per device at the peak of a call, with all that is in memory beside it.
      seconds: of one call.
    """

    name: str
    times: int
    gib: float
    seconds: Seconds


@dataclasses.dataclass(frozen=True)
class Layout:
    """How devices share a run.

    Attributes:
      attention: its plan, whose `heads` are known.
      data: devices over the batch, which the guidance pair may take.
      fsdp: devices over the weights and the batch.
      context: devices over the tokens: ring x ulysses, or any number where keys are gathered.
      sharded: whether weights are spread over the context axis, too.
      slices: slices of devices that the context axis spans.
    """

    attention: AttentionPlan
    data: int = 1
    fsdp: int = 1
    context: int = 1
    sharded: bool = False
    slices: int = 1

    @property
    def name(self) -> str:
        """The degrees as text."""
        plan = self.attention
        degrees = {"data": self.data, "fsdp": self.fsdp, "tensor": plan.tensor}
        over = [f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1]
        context = f"ring {plan.ring} x ulysses {plan.ulysses}"
        if plan.context < self.context:
            context = f"context {self.context}, keys gathered"
        return " x ".join([*over, context])

    @property
    def batch(self) -> int:
        """Devices over the batch."""
        return self.data * self.fsdp

    @property
    def holders(self) -> int:
        """Devices over which one copy of the weights is spread, without those of the tensor axis."""
        return self.fsdp * (self.context if self.sharded else 1)


class Expert(NamedTuple):
    """Denoise steps that one transformer computes, whether guidance makes them take two branches, and their size."""

    steps: int
    guided: bool
    net: str = "transformer"
    half: bool = False  # at half height and width


@dataclasses.dataclass(frozen=True)
class Run:
    """A run in numbers.

    Attributes:
      job: the run.
      configs: of its networks, by folder.
      device_kind, platform: of the devices, as jax calls them.
      nets: number and bytes of each network's weights, by folder.
      tokens: of the largest video that is denoised at once.
      experts: in order.
    """

    job: Job
    configs: Mapping[str, Any]
    device_kind: str
    platform: str
    nets: Mapping[str, tuple[int, int]]
    tokens: int
    experts: tuple[Expert, ...]

    @classmethod
    def of(cls, job: Job, recipe: Recipe, configs: Mapping[str, Any], device_kind: str, platform: str) -> Run:
        """The run of `job` with networks of these configs.

        Raises:
          UserError: a size does not suit the transformer.
        """
        from maxdiffusion.request import caching
        from maxdiffusion.weights import nets

        sizes = nets.sizes(builders(job.cfg, AttentionPlan(), device_kind), configs)
        counts = caching.counted(job, recipe)
        pairs = zip(counts, recipe.experts, strict=True)
        experts = tuple(Expert(n, each.guided, each.net, each.half) for n, each in pairs)
        return cls(job, configs, device_kind, platform, sizes, job.max_tokens(configs["transformer"]), experts)

    @functools.cached_property
    def _halved(self) -> Run:
        """The run at half height and width."""
        job = self.job.halved
        return dataclasses.replace(self, job=job, tokens=job.max_tokens(self.network))

    @property
    def network(self) -> DiTConfig:
        return self.configs["transformer"]

    @property
    def itemsize(self) -> int:
        """Bytes of one of the transformer's activations."""
        return 4 if self.job.cfg.activations_dtype == "float32" else 2

    @property
    def guided(self) -> bool:
        """Whether any step takes two branches."""
        return any(expert.guided for expert in self.experts)

    @property
    def steps(self) -> int:
        """Denoise steps of a segment."""
        return sum(expert.steps for expert in self.experts)

    @property
    def speed(self) -> DeviceSpeed:
        return KINDS[self.device_kind].speed if self.device_kind in KINDS else SPEEDS[self.platform]

    @property
    def linear_factor(self) -> float:
        """Seconds of the transformer's linear layers in units of those in bf16; few are outside of the blocks."""
        return quantization.seconds(quantization.choose(self.job.cfg.quantization, self.device_kind), self.device_kind)

    def batch(self, layout: Layout) -> int:
        """Videos of one batch."""
        return min(len(self.job.videos), self.job.cfg.per_device_batch_size * layout.batch)

    def units(self, layout: Layout) -> int:
        """Segments of batches that the run makes."""
        return -(-len(self.job.videos) // self.batch(layout)) * len(self.job.segments)

    def passes(self, expert: Expert, layout: Layout) -> tuple[int, int]:
        """Passes of the network in a step, of windows one for each turn, and examples that a device has in one."""
        from maxdiffusion.denoise.guidance import BATCHED_TOKENS

        mode, batch = self.job.cfg.guidance_mode, self.batch(layout)
        single, double = (-(-rows // layout.batch) for rows in (batch, 2 * batch))
        fits = self.tokens * double <= max(self.tokens * single, BATCHED_TOKENS)
        calls, examples, rows = 1, single, batch
        if expert.guided and (mode == "batched" or (mode == "auto" and fits)):
            examples, rows = double, 2 * batch
        elif expert.guided:
            calls = 2
        if self.job.windows is None:
            return calls, examples
        turns = self.job.windows.turns(rows, layout.batch)
        return calls * len(turns), rows * len(turns[0]) // layout.batch

    def text(self, layout: Layout) -> Figures:
        """The text encoder on one prompt."""
        weights, nbytes = self.nets["text_encoder"]
        share = nbytes / (layout.holders * layout.attention.tensor)
        seconds = _seconds(linear=2 * weights * TEXT / self.speed.peak, other=share / self.speed.memory)
        return Figures("text", len(self.job.prompts(self.guided)), share / GIB + 0.3, seconds)

    def step(self, layout: Layout) -> Figures:
        """One denoise step: the mean of the experts' seconds, the largest memory."""
        seconds, gib = Seconds(), 0.0
        for expert in self.experts:
            run = self._halved if expert.half else self
            calls, examples = run.passes(expert, layout)
            seconds += run._pass(examples, layout) * calls * expert.steps
            gib = max(gib, run._step_gib(expert, examples, layout) + run._cache_gib(calls * examples, layout))
        return Figures("step", self.steps * self.units(layout), gib, seconds * (1 / self.steps))

    def decode(self, layout: Layout) -> Figures:
        """The VAE on a segment of a batch; pixels are counted after its patches, where the convolutions see them."""
        weights, nbytes = self.nets["vae"]
        frames, itemsize = self.job.segments.length, 4 if self.job.cfg.vae_dtype == "float32" else 2
        largest = max(video.height * video.width for video in self.job.videos)
        pixels = frames * largest // (self.configs["vae"].patch_size or 1) ** 2
        share = -(-self.batch(layout) // layout.batch) * pixels / layout.context
        alive = (_VAE_ALIVE[0] + _VAE_ALIVE[1] * itemsize) * 4 * share / frames
        waits = self.units(layout) > 1 or self.job.cfg.cache_psnr is not None
        waiting = self.transformers(layout) if waits else 0.0
        seconds = _seconds(
            linear=_VAE_WORK * weights * share / (_PRODUCTS * self.speed.ceiling),
            other=_VAE_BYTES * share / self.speed.memory,
        )
        return Figures("decode", self.units(layout), waiting + (nbytes + alive) / GIB, seconds)

    def stages(self, layout: Layout) -> dict[str, Figures]:
        """The largest program of each stage of the run."""
        return {"text": self.text(layout), "denoise": self.step(layout), "decode": self.decode(layout)}

    def seconds(self, layout: Layout) -> float:
        """Seconds of the whole run."""
        return sum(each.times * each.seconds.total for each in self.stages(layout).values())

    def transformers(self, layout: Layout) -> float:
        """GiB on each device of the transformers in memory."""
        together = len({each.net for each in self.experts}) if self.job.cfg.expert_residency == "together" else 1
        return together * self.nets["transformer"][1] / (layout.holders * layout.attention.tensor) / GIB

    def attention(self, layout: Layout, examples: int) -> Attention:
        """Seconds of one layer's self-attention by the rule above, for so many examples on a device."""
        plan, speed = layout.attention, self.speed
        assert plan.heads is not None
        heads, shard = plan.heads // plan.tensor, -(-self.tokens // layout.context)
        dim = self.network.attention_head_dim
        rows, columns = queries, keys = shard * plan.ulysses, shard * layout.context // plan.ring
        if "block_q" in KERNELS[plan.kernel].options:
            own = plan.kernel == "flash"  # it skips padding within a block of keys
            sizes = (flash_blocks if own else blocks)(self.device_kind, queries, keys, plan.options)
            step = sizes.compute if own else sizes.kv
            rows, columns = -(-queries // sizes.q) * sizes.q, -(-keys // step) * step
        values = examples * shard * heads * dim
        hop = 4 * examples * (heads // plan.ulysses) * rows * columns * dim / speed.attention
        if plan.quantization != "none" and plan.kernel == "flash":
            hop *= quantization.ATTENTION.get(self.device_kind, 1.0)
        merge = _MERGED / speed.memory if KERNELS[plan.kernel].merges else _MERGE / speed.merging
        hops, share = plan.ring - 1, self.itemsize * values  # bytes of q, k, v or the output
        chips = {degree: max(1, degree // speed.cores) for degree in (layout.context, plan.ulysses)}
        if plan.context < layout.context:  # keys and values are gathered
            exchange = 2 * links.all_gather(share * layout.context, layout.context, chips[layout.context], speed)
        else:
            exchange = 4 * links.all_to_all(share, plan.ulysses, chips[plan.ulysses], speed)
        if layout.slices > 1:
            rotation = links.between_slices(2 * share, speed)
        else:
            rotation = links.permute(2 * share, layout.context, chips[layout.context], speed)
        return Attention(
            compute=plan.ring * hop,
            exchange=exchange,
            rotation=hops * max(0.0, rotation - hop),
            layouts=values * (hops * merge + (plan.ulysses > 1) * _SWAPS / speed.memory),
        )

    def _pass(self, examples: int, layout: Layout) -> Seconds:
        """One call of the transformer."""
        attention, speed, tensor = self.attention(layout, examples), self.speed, layout.attention.tensor
        layers = self.network.num_layers
        tokens = examples * -(-self.tokens // layout.context)
        weights, nbytes = self.nets["transformer"]
        activations = tokens * self.network.dim // tensor * self.itemsize
        gathers = links.all_gather(nbytes // tensor, layout.holders, -(-layout.holders // speed.cores), speed)
        return _seconds(
            attention=layers * attention.compute,
            linear=self.linear_factor * 2 * tokens * weights / tensor / (_LINEAR * speed.peak),
            other=layers * (attention.layouts + _PASSES * activations / speed.memory),
            exposed=layers * (_EXPOSED * attention.exchange + attention.rotation) + _GATHERING * gathers,
        )

    def _cache_gib(self, examples: int, layout: Layout) -> float:
        """What the step cache keeps of so many examples on a device."""
        from maxdiffusion.request import caching

        tokens = examples * -(-self.tokens // layout.context)
        return caching.kept(self.job.cfg) * tokens * self.network.dim * self.itemsize / GIB

    def _step_gib(self, expert: Expert, examples: int, layout: Layout) -> float:
        """Weights, of spread ones some layers whole, activations, and the keys and values of the text."""
        tensor, layers = layout.attention.tensor, self.network.num_layers
        whole = _WHOLE / layers * self.nets["transformer"][1] / tensor if layout.holders > 1 else 0.0
        value = self.network.dim // tensor * self.itemsize
        text = (1 + expert.guided) * -(-self.batch(layout) // layout.batch) * layers * 2 * TEXT * value
        tokens = examples * -(-self.tokens // layout.context)
        alive = _ALIVE + (_TURNING if layout.attention.ring > 1 else 0)
        return self.transformers(layout) + (whole + text + alive * tokens * value) / GIB


@dataclasses.dataclass(frozen=True)
class Attention:
    """Seconds of one layer: kernels, all-to-alls, rotation that no kernel hides, layouts and merges."""

    compute: float
    exchange: float
    rotation: float
    layouts: float


def choose(
    found: Mapping[tuple[int, int], Layout], refused: Mapping[tuple[int, int], UserError], run: Run
) -> tuple[int, int]:
    """The key (data, ulysses) of the legal split with the fastest run.

    Logs it, the others by time, and why the refused ones are illegal.
    """
    best, *others = sorted(found, key=lambda key: run.seconds(found[key]))
    log.info("ulysses_shards=auto: %s", _described(best, found[best], run))
    for key in others:
        log.info("  rather than %s", _described(key, found[key], run))
    for (data, ulysses), reason in refused.items():
        log.info("  not data %d, ulysses %d: %s", data, ulysses, reason)
    return best


def _described(key: tuple[int, int], layout: Layout, run: Run) -> str:
    pair = f"the guidance pair over data {key[0]}, " if key[0] > 1 else ""
    step = run.step(layout).seconds
    shown = ", ".join(f"{name} {getattr(step, name):.3g}" for name in ("attention", "linear", "other", "exposed"))
    plan = layout.attention
    return (
        f"{pair}ring {plan.ring} x ulysses {plan.ulysses}, modelled {run.seconds(layout):.4g} s, of a step "
        f"{step.total:.3g} ({shown})"
    )


def _seconds(**parts: float) -> Seconds:
    total = sum(parts.values())
    return Seconds(**parts, low=RANGE[0] * total, high=RANGE[1] * total)
