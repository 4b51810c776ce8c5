"""Which steps a step cache computes, as far as it is known before the run. Imports no jax, and numpy where needed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float

    from maxdiffusion.denoise.experts import ExpertSteps


def first_steps(experts: Sequence[ExpertSteps], counts: Sequence[int]) -> tuple[bool, ...]:
    """Whether each step of a run is among the first of its expert: one of `counts`, and at least one."""
    rows = zip(experts, counts, strict=True)
    return tuple(i < max(count, 1) for each, count in rows for i in range(each.stop - each.start))


def taylor(experts: Sequence[ExpertSteps], first: int, max_skips: int) -> tuple[bool, ...]:
    """The first steps of each expert, then, one step being left out, every (max_skips + 1)-th, as diffusers has it."""
    return tuple(
        i < max(first, 1) or (i - first - 1) % (max_skips + 1) == 0
        for each in experts
        for i in range(each.stop - each.start)
    )


def spectrum(experts: Sequence[ExpertSteps], first: int, max_skips: int | None = None) -> tuple[bool, ...]:
    """The steps that Spectrum computes (arXiv:2603.01623): the first of each expert, then one of a growing window.

    The window starts at 2 steps and grows by 0.75 at each computed one; `max_skips` bounds it.
    """
    compute = []
    for each in experts:
        window, skips = 2.0, 0
        for i in range(each.stop - each.start):
            widest = int(window) if max_skips is None else min(int(window), max_skips + 1)
            must = i < max(first, 1) or skips + 1 >= widest
            if must and i >= max(first, 1):
                window += 0.75
            skips = 0 if must else skips + 1
            compute.append(must)
    return tuple(compute)


def chebyshev_ridge(
    compute: Sequence[bool], starts: Sequence[int], degree: int, ridge: float
) -> tuple[Float[np.ndarray, "steps coefficients"], Float[np.ndarray, "steps coefficients"]]:
    """The Chebyshev polynomials at each step, and the gains of a ridge regression on those of the computed steps.

    With these the regression is recursive (recursive least squares): after a computed step of feature h, coef +=
    gain (h - basis coef), and coef = (X'X + ridge I)^-1 X'H always, X and H being basis and features of the computed
    steps since the expert's first. At the i-th step of an expert, i from 0, the polynomials are taken at 2 i / 50 - 1,
    as the reference has it whatever the number of steps is; of an expert with N > 50 steps at 2 i / N - 1.

    Args:
      compute: whether each step is computed.
      starts: the first step of each expert; a regression begins there.
      degree: of the last polynomial.
      ridge: weight of the penalty.
    """
    import numpy as np

    basis, gains = np.zeros((2, len(compute), degree + 1))
    for start, stop in itertools.pairwise([*starts, len(compute)]):
        inverse = np.eye(degree + 1) / ridge  # (X'X + ridge I)^-1
        at = 2 * np.arange(stop - start) / max(50, stop - start) - 1
        basis[start:stop] = np.polynomial.chebyshev.chebvander(at, degree)
        for step in range(start, stop):
            if compute[step]:
                x = basis[step]
                gains[step] = inverse @ x / (1 + x @ inverse @ x)
                inverse -= np.outer(gains[step], x @ inverse)
    return basis, gains


def mag(
    first: Sequence[bool],
    experts: Sequence[ExpertSteps],
    ratios: Sequence[float],
    threshold: float,
    max_skips: int,
) -> tuple[bool, ...]:
    """The steps that MagCache computes (Ma et al., 2025, algorithm 1).

    A step is left out while the sum of |1 - product of the ratios since the last computed step| is at most `threshold`.

    Args:
      first: steps that are computed whatever the ratios are.
      experts: of the run; each begins anew.
      ratios: of the residual's magnitude at a step to that at the step before.
      threshold: of the sum.
      max_skips: the most steps in a row that are left out.
    """
    starts, compute = {each.start for each in experts}, []
    product, error, skips = 1.0, 0.0, 0
    for step, (must, ratio) in enumerate(zip(first, ratios, strict=True)):
        if step in starts:
            product, error, skips = 1.0, 0.0, 0
        if not must:
            product, skips = product * float(ratio), skips + 1
            error += abs(1 - product)
            if error > threshold or skips > max_skips:
                must, product, error, skips = True, 1.0, 0.0, 0
        compute.append(must)
    return tuple(compute)


def nearest(ratios: Sequence[float], steps: int) -> list[float]:
    """The ratios of a run of so many steps: the nearest ones, the ends being kept, in the reference's fp32."""
    import numpy as np

    if steps == 1:
        return list(ratios[-1:])
    at = np.arange(steps, dtype=np.float32) * np.float32((len(ratios) - 1) / (steps - 1))
    return [ratios[int(i)] for i in np.round(at)]


class Published(NamedTuple):
    """What MagCache's authors publish of a model (https://github.com/Zehong-Ma/MagCache).

    Attributes:
      ratios: of the prompt's branch; the negative prompt's differ by less than 0.001 after the first steps.
      threshold: of the summed error.
      max_skips: the most steps in a row that are left out.
      first: part of each expert's steps that are computed first.
      whole_first: whether the high-noise expert computes all its steps.
    """

    ratios: tuple[float, ...]
    threshold: float
    max_skips: int
    first: float
    whole_first: bool = False


# 1e5 (ratio - 1) from the second step on; the first is 1.
_RATIOS: Mapping[str, str] = {
    "t2v-14b": (
        "2504 25 -150 -221 -340 -518 -533 -336 -566 -467 -532 -562 -484 -616 -596 -483 -591 -572 -653 -582 "
        "-729 -687 -785 -782 -784 -837 -862 -1018 -1004 -1130 -1228 -1233 -1427 -1499 -1620 -1823 -1963 -2322 "
        "-2454 -2816 -3289 -3651 -4371 -5074 -6036 -7489 -9307 -12040 -13889"
    ),
    "t2v-1.3b": (
        "1240 166 -209 -318 -366 -433 -584 -422 -430 -489 -465 -448 -459 -460 -511 -482 -516 -519 -585 -581 "
        "-604 -612 -651 -691 -730 -772 -829 -863 -932 -995 -1056 -1151 -1242 -1356 -1496 -1640 -1798 -2023 "
        "-2283 -2590 -2997 -3462 -4070 -4914 -5987 -7598 -9759 -13179 -18162"
    ),
    "i2v-480p": (
        "-1217 -2441 -1689 -1798 -1120 -1238 -1043 -948 -617 -1143 -935 -1155 -943 -1043 -1399 -1177 -1244 "
        "-1192 -1279 -1429 -1457 -1843 -1589 -2048 -1851 -2260 -2175 -2645 -2915 -2944 -3412 -3887 -4330 "
        "-5039 -6027 -6783 -8122 -9045 -7383"
    ),
    "i2v-720p": (
        "-572 -1412 -1727 -982 -1089 -1354 -546 -1090 -876 -898 -785 -485 -424 -932 -903 -834 -959 -799 -899 "
        "-1401 -1155 -1152 -1138 -1282 -1503 -1736 -1611 -2062 -2465 -2502 -2700 -3173 -3739 -4665 -5351 "
        "-6603 -8364 -10912 -13210"
    ),
    "vace-1.3b": (
        "129 56 -224 -274 -275 -420 -297 -137 -265 -286 -303 -310 -305 -303 -392 -279 -351 -341 -273 -397 "
        "-348 -365 -420 -419 -427 -469 -495 -519 -574 -597 -643 -698 -757 -840 -915 -1015 -1143 -1283 -1449 "
        "-1699 -1950 -2365 -2817 -3504 -4474 -5898 -8191 -12129 -19859"
    ),
    "t2v-a14b": (
        "124 -178 -304 -297 -340 -398 -422 -516 -367 -341 -466 -416 -319 -437 -560 -406 -534 -547 -611 -609 "
        "-646 -717 -732 -943 -875 -34477 -1192 -1235 -1490 -1689 -1950 -2224 -2722 -3269 -4143 -5615 -7882 "
        "-11892 -19737"
    ),
    "i2v-a14b": (
        "-809 -644 -674 -749 -607 -570 -724 -611 -726 -684 -621 -732 -778 -825 -8924 -1069 -913 -1148 -1105 "
        "-1194 -1290 -1387 -1566 -1700 -1815 -1869 -2170 -2381 -2736 -2912 -3432 -3955 -4678 -5421 -6703 "
        "-8301 -10826 -14590 -20177"
    ),
    "ti2v-5b t2v": (
        "-495 -559 -442 -501 -466 -532 -537 -540 -592 -550 -591 -597 -618 -651 -623 -670 -697 -783 -800 -799 "
        "-867 -888 -845 -1042 -1041 -1162 -1174 -1170 -1289 -1438 -1489 -1586 -1716 -1896 -2019 -2151 -2443 "
        "-2602 -2829 -3083 -3489 -3737 -4161 -4517 -5058 -5320 -5417 -5157 -3051"
    ),
    "ti2v-5b i2v": (
        "-488 -441 -405 -488 -454 -457 -504 -496 -556 -519 -565 -570 -589 -627 -587 -637 -665 -756 -771 -761 "
        "-837 -851 -809 -1020 -1010 -1151 -1154 -1139 -1260 -1412 -1461 -1556 -1690 -1881 -1999 -2138 -2445 "
        "-2608 -2848 -3129 -3565 -3871 -4361 -4824 -5554 -6028 -6425 -6463 -3345"
    ),
}


def _of(name: str, threshold: float, max_skips: int, first: float, whole_first: bool = False) -> Published:
    ratios = (1.0, *(1 + int(each) * 1e-5 for each in _RATIOS[name].split()))
    return Published(ratios, threshold, max_skips, first, whole_first)


# By variant; of TI2V by whether it starts from an image.
PUBLISHED: Mapping[tuple[str, bool], Published] = {
    ("wan2.1-t2v-14b", False): _of("t2v-14b", 0.12, 2, 0.2),
    ("wan2.1-t2v-1.3b", False): _of("t2v-1.3b", 0.12, 4, 0.2),
    ("wan2.1-i2v-14b-480p", True): _of("i2v-480p", 0.24, 6, 0.2),
    ("wan2.1-i2v-14b-720p", True): _of("i2v-720p", 0.24, 6, 0.2),
    ("wan2.1-vace-14b", False): _of("t2v-14b", 0.02, 3, 0.2),
    ("wan2.1-vace-1.3b", False): _of("vace-1.3b", 0.02, 3, 0.2),
    ("wan2.2-t2v-a14b", False): _of("t2v-a14b", 0.06, 2, 0.4),
    ("wan2.2-i2v-a14b", True): _of("i2v-a14b", 0.06, 2, 0.1, whole_first=True),
    ("wan2.2-ti2v-5b", False): _of("ti2v-5b t2v", 0.06, 2, 0.2),
    ("wan2.2-ti2v-5b", True): _of("ti2v-5b i2v", 0.06, 2, 0.2),
}
CALIBRATED = 0.06, 2, 0.2  # threshold, max_skips and first of a user's own ratios
