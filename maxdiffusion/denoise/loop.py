"""The only denoise loop. Strategies enter as values; the loop names no network, no solver and no mode.

A step is one pure function of (params, contexts, state, step inputs). It is compiled ahead of the run, once with
guidance and once without where both occur, and called step by step (progress, a state to keep between steps) or scanned
on the device; both give the same numbers. The step inputs hold all that a schedule, a step index or a guidance scale
contribute, so that the step-by-step program does not depend on them and a compile cache serves any number of steps.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from maxdiffusion.denoise.blending import by_window, cut_call, numbers, turns
from maxdiffusion.denoise.cache_rows import CacheRows
from maxdiffusion.denoise.caches import Cache, Evaluation, NoCache
from maxdiffusion.denoise.experts import ExpertSteps, calls, program_calls
from maxdiffusion.denoise.guidance import BatchedGuidance, Call, Guidance, NoGuidance, TwoPassGuidance
from maxdiffusion.denoise.network import Network
from maxdiffusion.denoise.schedule import Schedule
from maxdiffusion.denoise.solvers import Solver
from maxdiffusion.denoise.solvers.solver import Numbers
from maxdiffusion.denoise.windows import Windows
from maxdiffusion.models.dit.context import Contexts, without_shared
from maxdiffusion.parallel import axes, jit, like, put, shard


class State(NamedTuple):
    """The state between steps.

    Attributes:
      solver: the solver's state, which passes from expert to expert.
      cache: the step cache's states, one for each of a step's calls of the network, with windows of all their turns;
        None between experts.
    """

    solver: Any
    cache: Any = None

    @property
    def x(self) -> jax.Array:
        """The latents, b f h w c float32."""
        return self.solver.x


class StepInputs(NamedTuple):
    """The numbers of one step, or of N steps with a leading axis of N."""

    step: Numbers  # int32
    timestep: Numbers  # float32, 0..1000
    scale: Numbers  # float32, guidance
    solver: Any  # float32 coefficients
    cache: Any  # `Cache.table`


# Called with (i, n, state) after step i of n, counted from 0, when its state is ready on the device. The next step
# reuses the state's memory: copy what you keep.
OnStep = Callable[[int, int, State], None]


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """The strategies of a run, from which `compile` makes its programs.

    `experts` cover the steps of the schedule in order, or those from one of them on; their params and contexts have one
    structure, shape and sharding. `guidance` is used by guided experts; the others evaluate the prompt's branch alone.
    `scan` is the largest number of steps of a scanned call; None: every step is a call, and nothing is scanned.
    `windows` are those over which every call of the network is computed; None: the whole video at once.
    """

    network: Network
    experts: tuple[ExpertSteps, ...]
    schedule: Schedule
    solver: Solver
    guidance: TwoPassGuidance | BatchedGuidance = dataclasses.field(default_factory=TwoPassGuidance)
    cache: Cache = dataclasses.field(default_factory=NoCache)
    scan: int | None = None
    windows: Windows | None = None

    def step_inputs(self) -> StepInputs:
        """The inputs of all steps, stacked."""
        timesteps = self.schedule.timesteps
        coefficients = jax.tree.map(np.float32, self.solver.table(self.schedule))
        scales = np.ones(len(timesteps), np.float32)
        for expert in self.experts:
            scales[expert.start : expert.stop] = expert.guidance_scale
        steps = np.arange(len(timesteps), dtype=np.int32)
        return StepInputs(steps, timesteps, scales, coefficients, self.cache.table(self.schedule))

    def init(self, x: Float[Array, "b f h w c"], keys: UInt32[Array, "b 2"] | None = None) -> State:
        """The state at the first noise level, a copy: `x` stays valid when the state is donated.

        `keys` are those of a solver that draws noise (`noise.step_keys`); the others do not use them.
        """
        x = x.astype(jnp.float32)
        return _place(jax.tree.map(jnp.copy, State(self.solver.init(x, keys))))

    def step(self, guided: bool, params: Any, contexts: Contexts, state: State, inputs: StepInputs) -> State:
        guidance = self._guidance(guided)
        calls = guidance.calls(state.x, jnp.full(state.x.shape[:1], inputs.timestep), contexts)
        results = [self._call(params, *each, inputs.cache) for each in zip(calls, state.cache, strict=True)]
        velocities, caches = zip(*results, strict=True)
        v = guidance.combine(velocities, inputs.scale).astype(jnp.float32)
        return _place(State(self.solver.step(state.solver, inputs.solver, v), caches))

    def steps(self, guided: bool, params: Any, contexts: Contexts, state: State, inputs: StepInputs) -> State:
        return jax.lax.scan(lambda s, row: (self.step(guided, params, contexts, s, row), None), state, inputs)[0]

    def cache_state(self, guided: bool, params: Any, x: Any, context: Any) -> tuple[Any, ...]:
        """Shapes and shardings of the cache's state in guided or unguided steps; all arguments may be abstract."""

        def calls(x: jax.Array, context: Any) -> tuple[Call, ...]:
            x, timestep = x.astype(jnp.float32), jnp.zeros(x.shape[:1])
            return self._guidance(guided).calls(x, timestep, _contexts(guided, context))

        states = (self._cache_state(params, call) for call in jax.eval_shape(calls, x, context))
        return jax.tree.map(_like, tuple(states))

    def cache_rows(self, guided: bool, videos: int, tokens: int) -> CacheRows:
        """How the cache's state in guided or unguided steps holds so many videos of so many tokens a call."""
        calls, branches = 1 + guided, 1
        if guided and isinstance(self.guidance, BatchedGuidance):
            calls, branches = 1, 2
        rows = None if self.windows is None else tuple(map(tuple, numbers(self.windows, videos * branches)))
        return CacheRows(videos, calls, branches, rows, tokens)

    def lower(
        self, params: Any, x: Any, context: Any, keys: Any = None
    ) -> tuple[jax.stages.Lowered, dict[tuple[bool, int], jax.stages.Lowered], dict[bool, tuple[Any, ...]]]:
        """`init`, the program of each (guided, steps of one call), and `cache_state` by guided.

        All arguments may be abstract. `context` belongs to one branch of guidance; `keys` are as in `init`.
        """
        inputs, start = self.step_inputs(), _start(x, keys)
        init = jit(self.init, out_shardings=_shardings(jax.eval_shape(self.init, *start))).lower(*start)
        advance, programs = self.steps if self.scan else self.step, {}
        caches = {each.guided: self.cache_state(each.guided, params, x, context) for each in self.experts}
        for guided, steps in program_calls(self.experts, self.scan or 1):
            state = init.out_info._replace(cache=caches[guided])
            jitted = jit(advance, static_argnums=0, donate_argnums=3, out_shardings=_shardings(state))
            rows = self._rows(inputs, 0, steps)
            programs[guided, steps] = jitted.lower(guided, params, _contexts(guided, context), state, rows)
        return init, programs, caches

    def compile(self, params: Any, x: Any, context: Any, keys: Any = None) -> Program:
        """Compiles every program of the run; arguments as in `lower`."""
        began = time.perf_counter()
        init, programs, caches = self.lower(params, x, context, keys)
        compiled = {key: program.compile() for key, program in programs.items()}
        return Program(self, self.step_inputs(), init.compile(), compiled, caches, time.perf_counter() - began)

    def run(
        self,
        params: Any,
        x: Float[Array, "b f h w c"],
        contexts: Contexts,
        on_step: OnStep | None = None,
        keys: UInt32[np.ndarray, "b 2"] | None = None,
    ) -> Float[Array, "b f h w c"]:
        """Denoises `x`, pure noise at schedule.sigmas[0], to latents (float32): compile and call in one."""
        placed = None if keys is None else put(keys)
        return self.compile(params, x, contexts.positive, placed)(params, x, contexts, on_step, placed)

    def _guidance(self, guided: bool) -> Guidance:
        return self.guidance if guided else NoGuidance()

    def _call(self, params: Any, call: Call, cache: Any, row: Any) -> tuple[jax.Array, Any]:
        """The velocity of one call of the network and the new state of its cache."""

        def evaluate(call: Call, cache: Any) -> tuple[jax.Array, Any]:
            return self.cache(row, self._evaluation(params, call), cache)

        if self.windows is None:
            return evaluate(call, cache)
        return by_window(self.windows, self.network.cut, evaluate, call, cache)

    def _evaluation(self, params: Any, call: Call) -> Evaluation:
        net, (x, timestep, context) = self.network, call
        tokens, signal = net.embed(params, x, timestep, context)

        def first() -> tuple[jax.Array, jax.Array, Callable[[], jax.Array]]:
            before, after, state = net.first(params, tokens, signal, context)
            return before, after, lambda: net.rest(params, tokens, (after, state), signal, context)

        return Evaluation(
            x,
            tokens,
            net.valid(signal),
            lambda tokens: net.trunk(params, tokens, signal, context),
            first,
            lambda tokens: net.head(params, tokens, signal),
        )

    def _cache_state(self, params: Any, call: Any) -> Any:
        """Shapes of the cache's state in an abstract call."""

        def inputs(params: Any, call: Any) -> tuple[jax.Array, jax.Array]:
            if self.windows is not None:
                call = cut_call(call, turns(self.windows, call[0].shape[0])[0], self.network.cut)
            return call[0], self.network.embed(params, *call)[0]

        state = self.cache.init(*jax.eval_shape(inputs, params, call))
        if self.windows is None:
            return state
        rounds = turns(self.windows, call[0].shape[0])
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(rounds), *leaf.shape), leaf.dtype), state)

    def _rows(self, inputs: StepInputs, start: int, length: int) -> StepInputs:
        where = slice(start, start + length) if self.scan else start
        return jax.tree.map(lambda a: a[where], inputs)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A compiled run.

    Attributes:
      denoiser: the strategies it was made from.
      inputs: inputs of all steps.
      init: executable from noise (and keys, where it was compiled with them) to the first state.
      programs: (guided, steps of one call) -> executable.
      caches: guided -> abstract state of the step cache.
      seconds: time that compiling took.
    """

    denoiser: Denoiser
    inputs: StepInputs
    init: jax.stages.Compiled
    programs: dict[tuple[bool, int], jax.stages.Compiled]
    caches: dict[bool, tuple[Any, ...]]
    seconds: float

    def __call__(
        self,
        params: Any,
        x: Float[Array, "b f h w c"],
        contexts: Contexts,
        on_step: OnStep | None = None,
        keys: UInt32[Array, "b 2"] | None = None,
    ) -> Float[Array, "b f h w c"]:
        """From noise to latents, float32; all experts have the same params and contexts."""
        state = self.init(*_start(x, keys))
        for expert in self.denoiser.experts:
            state = self.advance(params, contexts, state, expert, on_step)
        return state.x

    def advance(
        self, params: Any, contexts: Contexts, state: State, expert: ExpertSteps, on_step: OnStep | None = None
    ) -> State:
        """Runs the steps of `expert` from the state after the step before them. `state` is donated.

        `contexts.negative` is used by guided experts only. `on_step` is called after every call of a compiled program:
        every step, or with scan so many steps as the calls of one of the denoiser's experts have.
        """
        n = len(self.inputs.step)
        if not expert.guided:
            contexts = Contexts(contexts.positive)
        if state.cache is None:
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), self.caches[expert.guided])
            state = state._replace(cache=zeros)
        for i, length in calls(expert, self.denoiser.scan or 1):
            program = self.programs[expert.guided, length]
            state = program(params, contexts, state, self.denoiser._rows(self.inputs, i, length))
            if on_step is not None:
                on_step(i + length - 1, n, jax.block_until_ready(state))
        return State(state.solver)

    def with_cache(self, cache: Cache) -> Program:
        """The same executables for a cache that differs from theirs in its table alone."""
        denoiser = dataclasses.replace(self.denoiser, cache=cache)
        return dataclasses.replace(self, denoiser=denoiser, inputs=denoiser.step_inputs())

    def place(self, state: State, guided: bool) -> State:
        """Puts the host arrays of a state, the same in all processes, on the devices; a state there stays.

        `guided` tells of the next step, to which the cache's state belongs.
        """
        if isinstance(state.solver.x, jax.Array):
            return state
        solver = jax.tree.map(_put, state.solver, self.init.output_shardings.solver)
        if state.cache is None:
            return State(solver)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.caches[guided])
        return State(solver, jax.tree.map(_put, state.cache, shardings))


def _put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _start(x: Any, keys: Any) -> tuple[Any, ...]:
    """The arguments of `init`."""
    return (x,) if keys is None else (x, keys)


def _contexts(guided: bool, context: Any) -> Contexts:
    """The contexts of a program, each branch with the shapes of `context`."""
    return Contexts(context, without_shared(context) if guided else None)


# By the number of an array's dimensions: arrays shaped as latents (b f h w c, of windows turns b f h w c) are sharded
# over the batch, tokens (b s e, of windows turns b s e) over batch and sequence, before and after a step alike; all
# others are whole.
_AXES = {
    6: (None, axes.BATCH, None, None, None, None),
    5: (axes.BATCH, None, None, None, None),
    4: (None, axes.BATCH, axes.SEQUENCE, None),
    3: (axes.BATCH, axes.SEQUENCE, None),
}


def _place(state: State) -> State:
    return jax.tree.map(lambda a: shard(a, *_AXES[a.ndim]) if a.ndim in _AXES else a, state)


def _like(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The same shape and dtype with the sharding of `_place`; outside of a placement jax chooses it."""
    return like(leaf.shape, leaf.dtype, *_AXES.get(len(leaf.shape), ()))


def _shardings(state: State) -> Any:
    return jax.tree.map(lambda leaf: _like(leaf).sharding, state)
