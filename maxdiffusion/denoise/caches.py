"""Step caches, which reuse what the network computed at earlier steps.

| cache | decides | reuses |
|---|---|---|
| `MagCache` (Ma et al., 2025, arXiv:2506.09045) | before the run, by published ratios | the trunk's residual |
| `TaylorSeer` (Liu et al., 2025, arXiv:2503.06923) | before the run, every n-th step | the velocity's Taylor series |
| `Spectrum` (arXiv:2603.01623) | before the run, in growing windows | the tokens' ridge regression on the step |
| `SeaCache` (arXiv:2602.18993) | by the change of the filtered latents | the extrapolated residual |
| `FirstBlock` (ParaAttention) | by the change of the first block's residual | the residual of the others |

Each row of a batch decides for itself, so that a video is the same whatever is beside it; a step is computed where any
row computes it. Decisions are reduced over all devices, which therefore agree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from maxdiffusion.denoise.cache_schedules import chebyshev_ridge
from maxdiffusion.denoise.schedule import Schedule
from maxdiffusion.denoise.solvers.solver import Numbers

T = TypeVar("T")

STEPS = 2000  # the most of a run, num_inference_steps and num_inference_steps_2


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One call of the network, in parts that a cache may leave out.

    Attributes:
      x: the latents, b f h w c.
      tokens: embedded, b s e.
      valid: which tokens are not padding, b s; None: all.
      trunk: tokens -> tokens after all blocks.
      first: () -> (tokens before the first block, after it, () -> tokens after all blocks).
      head: tokens after all blocks -> velocity, b f h w c.
    """

    x: jax.Array
    tokens: jax.Array
    valid: jax.Array | None
    trunk: Callable[[jax.Array], jax.Array]
    first: Callable[[], tuple[jax.Array, jax.Array, Callable[[], jax.Array]]]
    head: Callable[[jax.Array], jax.Array]


class Row(NamedTuple):
    """What a cache is told of a step, or of N steps with a leading axis."""

    step: Numbers  # int32, counted over the run
    compute: Numbers  # bool: the step is computed whatever the cache finds
    sigma: Numbers  # float32
    threshold: Numbers  # float32: that of the cache, so that one program serves all


@runtime_checkable
class Cache(Protocol):
    """A frozen value that computes a call of the network or reuses earlier ones.

    Each of a step's calls has its own state: one without guidance, two in two passes (prompt, negative prompt), one
    with batched guidance, whose rows hold both branches. It is zeros at the first step of every expert, so no expert
    sees another's; a step with such a state is computed.
    """

    def table(self, schedule: Schedule) -> Any:
        """Numbers of all steps, stacked: a pytree of arrays."""

    def init(self, x: jax.ShapeDtypeStruct, tokens: jax.ShapeDtypeStruct) -> Any:
        """The abstract state for such latents and tokens: a hashable pytree (tuples) of ShapeDtypeStructs."""

    def __call__(self, row: Any, call: Evaluation, state: Any) -> tuple[jax.Array, Any]:
        """The velocity at the step of `row`, computed or reused, and the new state."""

    def reads(self, step: int) -> bool:
        """Whether that step, or one after it, depends on the state before it; zeros do in its place where not."""


@dataclasses.dataclass(frozen=True)
class NoCache:
    """Every step computes the network."""

    def reads(self, step: int) -> bool:
        return False

    def table(self, schedule: Schedule) -> tuple[()]:
        return ()

    def init(self, x: jax.ShapeDtypeStruct, tokens: jax.ShapeDtypeStruct) -> tuple[()]:
        return ()

    def __call__(self, row: tuple[()], call: Evaluation, state: tuple[()]) -> tuple[jax.Array, tuple[()]]:
        return call.head(call.trunk(call.tokens)), state


class Residual(NamedTuple):
    """State of `MagCache` and `Calibration`."""

    log: Any  # float32, b * STEPS: 1 at each step that was computed
    count: Any  # int32, b: computed steps
    residual: Any  # b s e: tokens after all blocks - tokens, of the last computed step


@dataclasses.dataclass(frozen=True)
class MagCache:
    """Adds the residual of the last computed step. `compute` says which of all steps are computed, see `mag_cache`."""

    compute: tuple[bool, ...]

    def reads(self, step: int) -> bool:
        return not self.compute[step]

    def table(self, schedule: Schedule) -> Row:
        return _table(schedule, self.compute)

    def init(self, x: jax.ShapeDtypeStruct, tokens: jax.ShapeDtypeStruct) -> Residual:
        return Residual(*_counters(x), tokens)

    def __call__(self, row: Row, call: Evaluation, state: Residual) -> tuple[jax.Array, Residual]:
        compute = row.compute | (state.count == 0)

        def full() -> tuple[jax.Array, jax.Array]:
            out = call.trunk(call.tokens)
            return out, out - call.tokens

        out, residual = _select(compute, full, lambda: (call.tokens + state.residual, state.residual))
        return call.head(out), Residual(_logged(state.log, row, compute), state.count + compute, residual)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Computes every step, and logs the ratios of the residual's magnitude to that of the step before."""

    def reads(self, step: int) -> bool:
        return True

    def table(self, schedule: Schedule) -> Row:
        return _table(schedule, (True,) * len(schedule))

    def init(self, x: jax.ShapeDtypeStruct, tokens: jax.ShapeDtypeStruct) -> Residual:
        return Residual(*_counters(x), tokens)

    def __call__(self, row: Row, call: Evaluation, state: Residual) -> tuple[jax.Array, Residual]:
        out = call.trunk(call.tokens)
        residual = out - call.tokens
        now, before = (jnp.linalg.norm(each.astype(jnp.float32), axis=-1) for each in (residual, state.residual))
        valid = jnp.ones(now.shape) if call.valid is None else call.valid
        ratio = jnp.sum(now / (before + 1e-8) * valid, axis=1) / jnp.sum(valid, axis=1)
        log = _logged(state.log, row, jnp.where(state.count == 0, 1.0, ratio))
        return call.head(out), Residual(log, state.count + 1, residual)


class Series(NamedTuple):
    """State of `TaylorSeer`."""

    log: Any
    count: Any
    step: Any  # int32, b: the last computed one
    factors: tuple[Any, ...]  # divided differences of the velocity, b f h w c float32, one for each order


@dataclasses.dataclass(frozen=True)
class TaylorSeer:
    """Extrapolates the velocity by its Taylor series of degree `order` about the last computed step.

    diffusers calls it lite mode: its cached module is the last projection, which is linear in the velocity.
    """

    compute: tuple[bool, ...]
    order: int = 1

    def reads(self, step: int) -> bool:
        return True

    def table(self, schedule: Schedule) -> Row:
        return _table(schedule, self.compute)

    def init(self, x: jax.ShapeDtypeStruct, tokens: jax.ShapeDtypeStruct) -> Series:
        log, count = _counters(x)
        return Series(log, count, count, (jax.ShapeDtypeStruct(x.shape, jnp.float32),) * (self.order + 1))

    def __call__(self, row: Row, call: Evaluation, state: Series) -> tuple[jax.Array, Series]:
        compute = row.compute | (state.count == 0)
        offset = (row.step - state.step).astype(jnp.float32)

        def full() -> tuple[jax.Array, tuple[jax.Array, ...]]:
            velocity = call.head(call.trunk(call.tokens)).astype(jnp.float32)
            factors = [velocity]
            for order, old in enumerate(state.factors[:-1], 1):
                factor = (factors[-1] - old) / _column(jnp.maximum(offset, 1.0), velocity)
                factors.append(jnp.where(_column(state.count >= order, velocity), factor, 0.0))
            return velocity, tuple(factors)

        def extrapolated() -> tuple[jax.Array, tuple[jax.Array, ...]]:
            terms = (
                factor * _column(offset**order / math.factorial(order), factor)
                for order, factor in enumerate(state.factors)
            )
            return sum(terms, jnp.zeros_like(state.factors[0])), state.factors

        velocity, factors = _select(compute, full, extrapolated)
        step = jnp.where(compute, row.step, state.step)
        return velocity, Series(_logged(state.log, row, compute), state.count + compute, step, factors)


class Regression(NamedTuple):
    """State of `Spectrum`."""

    log: Any
    coefficients: tuple[Any, ...]  # b s e, of each Chebyshev polynomial


class Polynomials(NamedTuple):
    """`Row`, and what `cache_schedules.chebyshev_ridge` makes of it."""

    row: Row
    basis: Numbers  # float32, DEGREE + 1
    gains: Numbers


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Forecasts the tokens after all blocks by a ridge regression on Chebyshev polynomials of the step.

    The regression is updated at each computed step, so that its five coefficients are all the state. Kept in bfloat16
    they change a forecast by up to 0.4 %, sums of X'H by up to 33 % (measured on 50 steps of smooth features). `starts`
    are the first steps of the experts.
    """

    compute: tuple[bool, ...]
    starts: tuple[int, ...]

    DEGREE = 4
    RIDGE = 0.1

    def reads(self, step: int) -> bool:
        return True

    def table(self, schedule: Schedule) -> Polynomials:
        tables = chebyshev_ridge(self.compute, self.starts, self.DEGREE, self.RIDGE)
        return Polynomials(_table(schedule, self.compute), *(each.astype(np.float32) for each in tables))

    def init(self, x: jax.ShapeDtypeStruct, tokens: jax.ShapeDtypeStruct) -> Regression:
        return Regression(_counters(x)[0], (tokens,) * (self.DEGREE + 1))

    def __call__(self, row: Polynomials, call: Evaluation, state: Regression) -> tuple[jax.Array, Regression]:
        plain, basis, gains = row
        terms = (number * each.astype(jnp.float32) for number, each in zip(basis, state.coefficients, strict=True))
        forecast = sum(terms, jnp.zeros(call.tokens.shape, jnp.float32))

        def full() -> tuple[jax.Array, tuple[jax.Array, ...]]:
            out = call.trunk(call.tokens)
            change = out.astype(jnp.float32) - forecast
            pairs = zip(gains, state.coefficients, strict=True)
            return out, tuple((each + gain * change).astype(each.dtype) for gain, each in pairs)

        def reused() -> tuple[jax.Array, tuple[jax.Array, ...]]:
            return forecast.astype(call.tokens.dtype), state.coefficients

        out, coefficients = jax.lax.cond(plain.compute, full, reused)
        return call.head(out), Regression(_logged(state.log, plain, plain.compute), coefficients)


class Blocks(NamedTuple):
    """State of `FirstBlock`: residuals of the last computed step, b s e."""

    log: Any
    count: Any
    first: Any  # of the first block
    rest: Any  # of the others


@dataclasses.dataclass(frozen=True)
class FirstBlock:
    """Computes the first block, and the others where its residual r has changed by more than `threshold`.

    The change is sum |r - r'| / sum |r'|, r' that of the last computed step.
    """

    compute: tuple[bool, ...]
    threshold: float

    def reads(self, step: int) -> bool:
        return not self.compute[step]

    def table(self, schedule: Schedule) -> Row:
        return _table(schedule, self.compute, self.threshold)

    def init(self, x: jax.ShapeDtypeStruct, tokens: jax.ShapeDtypeStruct) -> Blocks:
        return Blocks(*_counters(x), tokens, tokens)

    def __call__(self, row: Row, call: Evaluation, state: Blocks) -> tuple[jax.Array, Blocks]:
        before, after, rest = call.first()
        first = after - before
        compute = row.compute | (state.count == 0) | (_change(first, state.first, call.valid) > row.threshold)

        def full() -> tuple[jax.Array, ...]:
            out = rest()
            return out, first, out - after

        out, first, others = _select(compute, full, lambda: (after + state.rest, state.first, state.rest))
        return call.head(out), Blocks(_logged(state.log, row, compute), state.count + compute, first, others)


class Spectral(NamedTuple):
    """State of `SeaCache`; b where no shape is given."""

    log: Any
    count: Any
    filtered: Any  # b f h w c float32: the last step's
    distance: Any  # float32, summed since the last computed step
    skipped: Any  # int32: steps since then
    steps: tuple[Any, Any]  # int32: the last two computed steps, the later one first
    residuals: tuple[Any, Any]  # b s e: theirs


@dataclasses.dataclass(frozen=True)
class SeaCache:
    """Reuses while the summed relative change of the filtered latents is below `threshold`.

    The filter is that of the signal in the noise of the step, with a power of 1 / |f|^3. The residual is extrapolated
    from the last two; at most `max_skips` steps in a row are reused.
    """

    compute: tuple[bool, ...]
    threshold: float
    max_skips: int

    def reads(self, step: int) -> bool:
        return True

    def table(self, schedule: Schedule) -> Row:
        return _table(schedule, self.compute, self.threshold)

    def init(self, x: jax.ShapeDtypeStruct, tokens: jax.ShapeDtypeStruct) -> Spectral:
        log, count = _counters(x)
        latents, distance = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x.shape, count.shape))
        return Spectral(log, count, latents, distance, count, (count, count), (tokens, tokens))

    def __call__(self, row: Row, call: Evaluation, state: Spectral) -> tuple[jax.Array, Spectral]:
        filtered = filter_signal(call.x, row.sigma)
        distance = state.distance + _change(filtered, state.filtered)
        needed = (distance >= row.threshold) | (state.skipped >= self.max_skips)
        compute = row.compute | (state.count == 0) | needed
        (later, earlier), (last, previous) = state.steps, state.residuals
        slope = (row.step - later) / jnp.maximum(later - earlier, 1)
        slope = jnp.where(state.count >= 2, slope, 0.0).astype(jnp.float32)

        def full() -> tuple[jax.Array, ...]:
            out = call.trunk(call.tokens)
            return out, out - call.tokens, last

        def extrapolated() -> tuple[jax.Array, ...]:
            new, old = (each.astype(jnp.float32) for each in (last, previous))
            residual = new + (new - old) * _column(slope, new)
            return (call.tokens + residual).astype(call.tokens.dtype), last, previous

        out, *residuals = _select(compute, full, extrapolated)
        steps = jnp.where(compute, row.step, later), jnp.where(compute, later, earlier)
        return call.head(out), Spectral(
            _logged(state.log, row, compute),
            state.count + compute,
            filtered,
            jnp.where(compute, 0.0, distance),
            jnp.where(compute, 0, state.skipped + 1),
            steps,
            (residuals[0], residuals[1]),
        )


def filter_signal(x: Float[Array, "b f h w c"], sigma: Numbers) -> Float[Array, "b f h w c"]:
    """The latents through a Wiener filter along f, h and w for a signal of power 1 / |f|^3 in noise of `sigma`.

    Its mean gain is 1 (SeaCache, eq. 7). The gain is a product over the axes, so that each is one product with a
    circulant matrix: XLA's CPU compiler fails on a Fourier transform in the loop over windows of some meshes.
    """
    noise, found, highest = jnp.clip(sigma, 1e-6, 1 - 1e-6), x.astype(jnp.float32), jax.lax.Precision.HIGHEST
    signal = 1 - noise
    for axis, size in zip("fhw", x.shape[1:4], strict=True):
        power = (1 / (np.abs(np.fft.fftfreq(size)) ** 3 + 1e-16)).astype(np.float32)
        gain = signal * power / (signal**2 * power + noise**2 + 1e-16)
        at = np.arange(size)
        waves = (np.cos(2 * np.pi * np.outer(at, at) / size) / size).astype(np.float32)
        response = jnp.matmul(waves, gain / gain.mean(), precision=highest)
        circulant = response[(at[:, None] - at) % size]
        found = jnp.einsum(f"bfhwc,k{axis}->{'bfhwc'.replace(axis, 'k')}", found, circulant, precision=highest)
    return found


def logs(calls: Sequence[np.ndarray], rows: int, guided: bool) -> Float[np.ndarray, "rows branches steps"]:
    """The logs of a step's calls by row and branch; of several windows the largest value."""
    branches = 1 + (guided and len(calls) == 1)
    each = [log.reshape(-1, rows, branches, log.shape[-1] // (rows * branches * STEPS), STEPS) for log in calls]
    return np.concatenate([log.max(axis=(0, 3)) for log in each], axis=1)


def _table(schedule: Schedule, compute: Sequence[bool], threshold: float = 0.0) -> Row:
    count = len(schedule)
    steps, thresholds = np.arange(count, dtype=np.int32), np.full(count, threshold, np.float32)
    return Row(steps, np.array(compute, bool), schedule.sigmas[:count], thresholds)


def _counters(x: jax.ShapeDtypeStruct) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    rows = x.shape[0]
    return jax.ShapeDtypeStruct((rows * STEPS,), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)


def _logged(log: jax.Array, row: Row, value: jax.Array) -> jax.Array:
    return log.reshape(-1, STEPS).at[:, row.step].set(value.astype(jnp.float32)).reshape(-1)


def _select(compute: Bool[Array, " b"], full: Callable[[], T], reuse: Callable[[], T]) -> T:
    """`full()` in the rows that compute and `reuse()` in the others; only `reuse` is evaluated where none does."""

    def some() -> T:
        return jax.tree.map(lambda new, old: jnp.where(_column(compute, new), new, old), full(), reuse())

    return jax.lax.cond(jnp.any(compute), some, reuse)


def _column(rows: jax.Array, like: jax.Array) -> jax.Array:
    """A number for each row, to broadcast over the row."""
    return rows.reshape(-1, *[1] * (like.ndim - 1))


def _change(new: jax.Array, old: jax.Array, valid: jax.Array | None = None) -> Float[Array, " b"]:
    """The relative change of each row, sum |new - old| / sum |old|, without padding."""
    difference, size = (jnp.abs(each.astype(jnp.float32)) for each in (new.astype(jnp.float32) - old, old))
    if valid is not None:
        difference, size = (each * valid[..., None] for each in (difference, size))
    axes = range(1, new.ndim)
    return jnp.sum(difference, axis=axes) / (jnp.sum(size, axis=axes) + 1e-16)
