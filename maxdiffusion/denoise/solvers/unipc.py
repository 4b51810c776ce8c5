"""UniPC-p (Zhao et al. 2023, arXiv 2302.04867), data prediction, B(h) = e^-h - 1; the default of the official models.

Each step corrects its starting point with the x0 just predicted there (UniC, no further network call), then predicts
the next point (UniP). In the paper's symbols, lambda the log-SNR and h = lambda_t - lambda_s > 0, both are

  x_t = sigma_t / sigma_s x_s - alpha_t (e^-h - 1) m_s - alpha_t (e^-h - 1) sum_k rho_k (m_k - m_s) / r_k,

where r_k = (lambda_k - lambda_s) / h; UniP takes the nodes k before s, UniC those and t itself (r = 1). References,
which agree: FlowUniPCMultistepScheduler of the official code and diffusers' UniPCMultistepScheduler(use_flow_sigmas,
flow_prediction, predict_x0, lower_order_final). As there, a single node has rho = 1/2, the order grows from 1 and falls
again to 1 at the last step, which alone may end at sigma 0 (the other variant, bh1, has B(h) = -h, which is infinite
there: the reference itself returns NaN).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from maxdiffusion.denoise.schedule import Schedule, unipc_flow
from maxdiffusion.denoise.solvers.solver import Numbers, log_snr


class UniPCState(NamedTuple):
    x: jax.Array  # predicted, not yet corrected
    last: jax.Array  # the corrected point of the step before; x itself before the first
    x0s: tuple[jax.Array, ...]  # predictions of the steps before, newest first; zeros, with weight 0, where none was


class UniPCTable(NamedTuple):
    sigma: Numbers  # (N,)
    corrector: Numbers  # (N, 2 + order): weights of last, this x0, x0s
    predictor: Numbers  # (N, 1 + order): weights of the corrected point, this x0, x0s (all but the oldest)


@dataclasses.dataclass(frozen=True)
class UniPC:
    """`order` 1, 2 or 3 is p of UniP-p; the corrector makes the whole one order better where it applies."""

    order: Literal[1, 2, 3] = 2

    schedule = staticmethod(unipc_flow)

    def table(self, schedule: Schedule) -> UniPCTable:
        sigmas = np.minimum(schedule.sigmas.astype(np.float64), 1 - 1e-6)  # as the reference: finite log(1 - sigma)
        lam = log_snr(sigmas)
        n = len(schedule)
        corrector, predictor = np.zeros((n, 2 + self.order)), np.zeros((n, 1 + self.order))
        corrector[0, 0] = 1
        for i in range(n):
            order = min(self.order, i + 1, n - i)
            h = lam[i + 1] - lam[i]
            ratios = [(lam[i - k] - lam[i]) / h for k in range(1, order)]
            predictor[i, : order + 1] = self._weights(sigmas[i], sigmas[i + 1], h, ratios)
            if i + 1 < n:
                keep, this, *before, new = self._weights(sigmas[i], sigmas[i + 1], h, [*ratios, 1.0])
                corrector[i + 1, : order + 2] = keep, new, this, *before
        return UniPCTable(sigmas[:-1], corrector, predictor)

    def _weights(self, sigma_s: float, sigma_t: float, h: float, ratios: list[float]) -> list[float]:
        """The weights of x_s, m_s and of each node's m_k."""
        r, gain = np.array(ratios), -(1 - sigma_t) * np.expm1(-h)
        rho = np.full(len(r), 0.5) if len(r) <= 1 else _solve_order_conditions(r, h)
        nodes = gain * rho / r
        return [sigma_t / sigma_s, gain - nodes.sum(), *nodes]

    def init(self, x: Float[Array, "b f h w c"], keys: UInt32[Array, "b 2"] | None = None) -> UniPCState:
        return UniPCState(x, x, (jnp.zeros_like(x),) * self.order)

    def step(self, state: UniPCState, row: UniPCTable, velocity: Float[Array, "b f h w c"]) -> UniPCState:
        x0 = state.x - row.sigma * velocity
        corrected = _dot(row.corrector, (state.last, x0, *state.x0s))
        x0s = (x0, *state.x0s[:-1])
        return UniPCState(_dot(row.predictor, (corrected, *x0s)), corrected, x0s)


def _solve_order_conditions(r: np.ndarray, h: float) -> np.ndarray:
    """The rho of the paper's theorem 3.1: sum_k rho_k r_k^(j-1) = j! psi_j / (e^-h - 1) for j = 1 .. len(r).

    psi_1 = (e^-h - 1) / -h - 1 and psi_j = psi_{j-1} / -h - 1 / j!.
    """
    psi, moments = np.expm1(-h) / -h - 1, []
    for j in range(1, len(r) + 1):
        moments.append(math.factorial(j) * psi / np.expm1(-h))
        psi = psi / -h - 1 / math.factorial(j + 1)
    return np.linalg.solve(np.vander(r, increasing=True).T, np.array(moments))


def _dot(weights: Numbers, terms: tuple[Float[Array, "b f h w c"], ...]) -> Float[Array, "b f h w c"]:
    return sum((weights[k] * term for k, term in enumerate(terms[1:], start=1)), weights[0] * terms[0])
