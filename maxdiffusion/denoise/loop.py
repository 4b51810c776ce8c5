"""The only denoise loop. What varies enters as values; the loop knows no network, no solver and no mode by name.

A step is one pure function of (params, contexts, state, row of the plan). It is compiled ahead of the run, once, and
called step by step (progress, a state to keep between steps) or scanned on the device; both give the same numbers. The
row holds all that a schedule, a step index or a guidance scale contribute, so that the step-by-step program does not
depend on them and a compile cache serves any number of steps.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from maxdiffusion.denoise.caches import Cache, NoCache
from maxdiffusion.denoise.experts import Segment
from maxdiffusion.denoise.guidance import Contexts, Guidance
from maxdiffusion.denoise.network import Network
from maxdiffusion.denoise.schedule import Schedule
from maxdiffusion.denoise.solvers import Solver
from maxdiffusion.denoise.solvers.solver import Numbers
from maxdiffusion.parallel import axes, jit, like, shard


class State(NamedTuple):
    """All that changes from step to step."""

    solver: Any
    cache: Any

    @property
    def x(self) -> jax.Array:
        """The latents, b f h w c float32."""
        return self.solver.x


class Row(NamedTuple):
    """What one step is told; a plan is the same with a leading axis of N."""

    step: Numbers  # int32
    timestep: Numbers  # float32, 0..1000
    scale: Numbers  # float32, guidance
    solver: Any  # float32 coefficients


# Called after step i of n (counted from 0), its state ready on the device; the state must not be kept, the next step
# reuses its memory (copy what you keep).
OnStep = Callable[[int, int, State], None]


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A run before its data: the strategies, from which `compile` makes the program.

    `segments` cover the steps of the schedule in order; all have params and contexts of one structure, shape and
    sharding.
    """

    network: Network
    segments: tuple[Segment, ...]
    schedule: Schedule
    solver: Solver
    guidance: Guidance
    cache: Cache = dataclasses.field(default_factory=NoCache)
    scan: bool = False

    def plan(self) -> Row:
        """The rows of all steps, stacked."""
        timesteps = self.schedule.timesteps
        coefficients = jax.tree.map(np.float32, self.solver.table(self.schedule))
        scales = np.concatenate([np.full(s.stop - s.start, s.guidance_scale, np.float32) for s in self.segments])
        return Row(np.arange(len(timesteps), dtype=np.int32), timesteps, scales, coefficients)

    def init(self, x: Float[Array, "b f h w c"]) -> State:
        """The state at the first noise level; own memory, `x` stays valid when the state is donated."""
        x = x.astype(jnp.float32)
        return _place(jax.tree.map(jnp.copy, State(self.solver.init(x), self.cache.init(x))))

    def step(self, params: Any, contexts: Contexts, state: State, row: Row) -> State:
        def velocity(x: jax.Array) -> jax.Array:
            timestep = jnp.full(x.shape[:1], row.timestep)
            predict = functools.partial(self.network, params)
            return self.guidance(predict, x, timestep, contexts, row.scale).astype(jnp.float32)

        v, cache = self.cache.velocity(velocity, state.cache, row.step, state.x)
        return _place(State(self.solver.step(state.solver, row.solver, v), cache))

    def steps(self, params: Any, contexts: Contexts, state: State, rows: Row) -> State:
        return jax.lax.scan(lambda s, row: (self.step(params, contexts, s, row), None), state, rows)[0]

    def lower(
        self, params: Any, x: Any, contexts: Contexts
    ) -> tuple[jax.stages.Lowered, dict[int, jax.stages.Lowered]]:
        """`init`, and for each number of steps the program of so many; all arguments may be descriptions."""
        plan = self.plan()
        placed = jax.tree.map(lambda leaf: _like(leaf).sharding, jax.eval_shape(self.init, x))
        init = jit(self.init, out_shardings=placed).lower(x)
        lengths = {segment.stop - segment.start for segment in self.segments} if self.scan else {1}
        advance = jit(self.steps if self.scan else self.step, donate_argnums=2, out_shardings=placed)
        programs = {
            length: advance.lower(params, contexts, init.out_info, self._rows(plan, 0, length)) for length in lengths
        }
        return init, programs

    def compile(self, params: Any, x: Any, contexts: Contexts) -> Program:
        """Compiles every program of the run; the arguments may be ShapeDtypeStructs with shardings."""
        start = time.perf_counter()
        init, programs = self.lower(params, x, contexts)
        compiled = {length: program.compile() for length, program in programs.items()}
        return Program(self, self.plan(), init.compile(), compiled, time.perf_counter() - start)

    def run(
        self, params: Any, x: Float[Array, "b f h w c"], contexts: Contexts, on_step: OnStep | None = None
    ) -> Float[Array, "b f h w c"]:
        """Denoises `x`, pure noise at schedule.sigmas[0], to latents (float32): compile and call in one."""
        return self.compile(params, x, contexts)(params, x, contexts, on_step)

    def _rows(self, plan: Row, start: int, length: int) -> Row:
        where = slice(start, start + length) if self.scan else start
        return jax.tree.map(lambda a: a[where], plan)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A compiled run. `seconds` is what compiling took; `programs` maps a number of steps to its executable."""

    denoiser: Denoiser
    plan: Row
    init: jax.stages.Compiled
    programs: dict[int, jax.stages.Compiled]
    seconds: float

    def __call__(
        self, params: Any, x: Float[Array, "b f h w c"], contexts: Contexts, on_step: OnStep | None = None
    ) -> Float[Array, "b f h w c"]:
        """From noise to latents, float32, all segments with the same params and contexts."""
        state = self.init(x)
        for segment in self.denoiser.segments:
            state = self.advance(params, contexts, state, segment, on_step)
        return state.x

    def advance(
        self, params: Any, contexts: Contexts, state: State, segment: Segment, on_step: OnStep | None = None
    ) -> State:
        """Runs the steps of `segment` on a state that has done those before. `state` is donated.

        `on_step` follows every call of a compiled program: every step, or with scan the whole segment, whose length
        must be that of one of the denoiser's.
        """
        n = len(self.plan.step)
        length = segment.stop - segment.start if self.denoiser.scan else 1
        for i in range(segment.start, segment.stop, length):
            state = self.programs[length](params, contexts, state, self.denoiser._rows(self.plan, i, length))
            if on_step is not None:
                on_step(i + length - 1, n, jax.block_until_ready(state))
        return state


def _place(state: State) -> State:
    """Latents and everything of their shape are sharded over the batch, before and after a step alike."""
    return jax.tree.map(lambda a: shard(a, axes.BATCH, None, None, None, None) if a.ndim == 5 else a, state)


def _like(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The same of what `_place` was given or jax is to place."""
    return like(leaf.shape, leaf.dtype, *([axes.BATCH] if leaf.ndim == 5 else []))
