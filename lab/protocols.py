"""Scores of others, and the arithmetic of comparing with them: human-normalised scores, IQM, bootstrap intervals.

Random and human: `dqn_zoo/atari_data.py` of google-deepmind/dqn_zoo at f87bb1f (no-op starts, 108,000 frames at most, undiscounted).
MFEC and NEC: Table 3 of Pritzel et al. 2017, "Neural Episodic Control" (arXiv 1703.01988), after 10,000,000 frames. Its mean
human-normalised scores come out only if Video Pinball's random score is taken as 0; its medians hold either way, so compare medians.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

PUBLISHED_FRAMES = 10_000_000
"""Environment frames after which `Scores.mfec` and `Scores.nec` were measured."""

PUBLISHED_SOURCE = "Pritzel et al. 2017, Table 3"


class Scores(NamedTuple):
    """Raw returns of one game by four players: at random, a professional tester, and two published agents at `PUBLISHED_FRAMES`."""

    random: float
    human: float
    mfec: float
    nec: float


_TABLE = """
Alien                227.8   7127.7   1717.7   3460.6
Amidar                 5.8   1719.5    370.9    811.3
Assault              222.4    742.0    510.2    599.9
Asterix              210.0   8503.3   1776.6   2480.4
Asteroids            719.1  47388.7   4706.8   2496.1
Atlantis           12850.0  29028.1  95499.4  51208.0
BankHeist             14.2    753.1    163.7    343.3
BattleZone          2360.0  37187.5  19053.6  13345.5
BeamRider            363.9  16926.5    858.8    749.6
Berzerk              123.7   2630.4    924.2    852.8
Bowling               23.1    160.7     51.8     71.8
Boxing                 0.1     12.1     10.7     72.8
Breakout               1.7     30.5     86.2     13.6
Centipede           2090.9  12017.0  20608.8  12314.5
ChopperCommand       811.0   7387.8   3075.6   5070.3
CrazyClimber       10780.5  35829.4   9892.2  34344.0
Defender            2874.5  18688.9  10052.8   6126.1
DemonAttack          152.1   1971.0   1081.8    641.4
DoubleDunk           -18.6    -16.4    -13.2      1.8
Enduro                 0.0    860.5      0.0      1.4
FishingDerby         -91.7    -38.7    -90.3    -72.2
Freeway                0.0     29.6      0.6     13.5
Frostbite             65.2   4334.7    925.1   2747.4
Gopher               257.6   2412.5   4412.6   2432.3
Gravitar             173.0   3351.4   1011.3   1257.0
Hero                1027.0  30826.4  14767.7  16265.3
IceHockey            -11.2      0.9     -6.5     -1.6
Jamesbond             29.0    302.8    244.7    376.8
Kangaroo              52.0   3035.0   2465.7   2489.1
Krull               1598.0   2665.5   4555.2   5179.2
KungFuMaster         258.5  22736.3  12906.5  30568.1
MontezumaRevenge       0.0   4753.3     76.4     42.1
MsPacman             307.3   6951.6   3802.7   4142.8
NameThisGame        2292.3   8049.0   4845.1   5532.0
Phoenix              761.4   7242.6   5334.5   5756.5
Pitfall             -229.4   6463.7    -79.0      0.0
Pong                 -20.7     14.6    -20.0     20.4
PrivateEye            24.9  69571.3   3963.8    162.2
Qbert                163.9  13455.0  12500.4   7419.2
Riverraid           1338.5  17118.0   4195.0   5498.1
RoadRunner            11.5   7845.0   5432.1  12661.4
Robotank               2.2     11.9      7.3     11.1
Seaquest              68.4  42054.7    711.6   1015.3
Skiing            -17098.1  -4336.9 -15278.9 -26340.7
Solaris             1236.3  12326.7   8717.5   7201.0
SpaceInvaders        148.0   1668.7   2027.8   1016.0
StarGunner           664.0  10250.0  14843.9   1171.4
Surround             -10.0      6.5     -9.9     -7.9
Tennis               -23.8     -8.3    -23.7     -1.8
TimePilot           3568.0   5229.2  10751.3  10282.7
Tutankham             11.4    167.6     86.3    121.6
UpNDown              533.4  11693.2  22320.8  39823.3
Venture                0.0   1187.5      0.0      0.0
VideoPinball       16256.9  17667.9  90507.7  22842.6
WizardOfWor          563.5   4756.5  12803.1   8480.7
YarsRevenge         3092.9  54576.9   5956.7  21490.5
Zaxxon                32.5   9173.3   6288.1  10082.4
"""

SCORES: dict[str, Scores] = {name: Scores(*map(float, numbers)) for name, *numbers in map(str.split, _TABLE.strip().splitlines())}
"""Environment name -> scores, for the 57 games of the literature."""


def human_normalised(env: str, score: float) -> float | None:
    """(score - random) / (human - random): 0 plays like chance, 1 like a professional tester. None where the game is not in `SCORES`."""
    known = SCORES.get(env)
    return None if known is None else (score - known.random) / (known.human - known.random)


def mean(scores: ArrayLike) -> NDArray[np.float64]:
    """Mean over runs and tasks: (..., runs, tasks) -> (...)."""
    return np.asarray(scores, np.float64).mean(axis=(-2, -1))


def median_of_tasks(scores: ArrayLike) -> NDArray[np.float64]:
    """Median over tasks of each task's mean over runs: (..., runs, tasks) -> (...). The "median human-normalised score" of the papers."""
    return np.asarray(np.median(np.asarray(scores, np.float64).mean(axis=-2), axis=-1))


def iqm(scores: ArrayLike) -> NDArray[np.float64]:
    """Interquartile mean: (..., runs, tasks) -> (...), the mean of what is left when floor(n / 4) of all n scores are cut from each end.

    Agarwal et al. 2021, "Deep RL at the Edge of the Statistical Precipice" (arXiv 2108.13264), section 4.3, as in its library rliable.
    """
    array = np.asarray(scores, np.float64)
    ordered = np.sort(array.reshape(*array.shape[:-2], -1), axis=-1)
    cut = ordered.shape[-1] // 4
    return np.asarray(ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1))


Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def stratified_bootstrap(
    scores: ArrayLike, statistic: Statistic = mean, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of `statistic` over (runs, tasks) scores: runs are drawn anew within each task (arXiv 2108.13264, 4.1).

    Args:
        scores: finite, (runs, tasks); one task is a plain bootstrap over runs.
        statistic: reduces the last two axes of (resamples, runs, tasks).
        level: the share of resampled statistics that the interval holds, within (0, 1).
        resamples: how many are drawn.
        seed: of the draws; the interval is a function of the arguments.

    Returns:
        (low, high), in the unit of the scores.

    Raises:
        ValueError: no scores, scores that are not finite, or not of two dimensions.
    """
    array = np.asarray(scores, np.float64)
    if array.ndim != 2 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"a bootstrap needs finite scores of shape (runs, tasks), got shape {array.shape}")
    runs, tasks = array.shape
    generator = np.random.default_rng(seed)
    at_once = max(1, min(resamples, 4_000_000 // array.size))
    drawn: list[NDArray[np.float64]] = []
    for begin in range(0, resamples, at_once):
        rows = generator.integers(runs, size=(min(at_once, resamples - begin), runs, tasks))
        drawn.append(statistic(array[rows, np.arange(tasks)]))
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(values: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of one sample of n values by the bootstrap, values that are not finite left out; three NaN where none is left."""
    array = np.asarray(values, np.float64).ravel()
    array = array[np.isfinite(array)]
    if array.size == 0:
        return math.nan, math.nan, math.nan
    low, high = stratified_bootstrap(array[:, None], mean, level, resamples, seed)
    return float(array.mean()), low, high
