"""Human-normalised scores, IQM and bootstrap intervals against answers worked out by hand."""

import math

import numpy as np
import pytest

from lab import protocols


def test_published_medians_follow_from_the_tables() -> None:
    normalised = {
        agent: [protocols.human_normalised(env, getattr(scores, agent)) for env, scores in protocols.SCORES.items()]
        for agent in ("mfec", "nec")
    }
    assert len(protocols.SCORES) == 57
    # Table 1 of the NEC paper, 10M frames, in percent.
    assert float(protocols.median_of_tasks([normalised["mfec"]])) * 100 == pytest.approx(45.4, abs=0.05)
    assert float(protocols.median_of_tasks([normalised["nec"]])) * 100 == pytest.approx(54.6, abs=0.05)


def test_published_means_follow_once_video_pinball_starts_at_zero() -> None:
    def mean_percent(agent: str) -> float:
        return 100 * float(
            np.mean(
                [
                    (getattr(s, agent) - s.random * (env != "VideoPinball")) / (s.human - s.random * (env != "VideoPinball"))
                    for env, s in protocols.SCORES.items()
                ]
            )
        )

    assert mean_percent("mfec") == pytest.approx(85.0, abs=0.05)
    assert mean_percent("nec") == pytest.approx(99.8, abs=0.05)


def test_human_normalised_is_zero_at_random_and_one_at_human() -> None:
    for env, scores in protocols.SCORES.items():
        assert protocols.human_normalised(env, scores.random) == 0
        assert protocols.human_normalised(env, scores.human) == pytest.approx(1)
    assert protocols.human_normalised("Pong", -3.05) == pytest.approx(0.5)  # half way from -20.7 to 14.6
    assert protocols.human_normalised("Chain", 1.0) is None


@pytest.mark.parametrize(
    ("scores", "answer"),
    [
        ([[0.0, 1.0, 2.0, 3.0]], 1.5),
        ([[100.0, 1.0], [2.0, -100.0]], 1.5),  # runs and tasks are pooled, whatever their order
        ([[5.0]], 5.0),
        ([[0.0, 0.0, 9.0]], 3.0),  # floor(3 / 4) = 0 are cut
        ([np.arange(9.0)], 4.0),  # floor(9 / 4) = 2 are cut: mean of 2..6
        ([[0, 0, 1, 2, 3, 10, 1000, 5]], (1 + 2 + 3 + 5) / 4),
    ],
)
def test_iqm_by_hand(scores: list, answer: float) -> None:
    assert float(protocols.iqm(scores)) == pytest.approx(answer)


def test_statistics_reduce_the_last_two_axes_only() -> None:
    batch = np.arange(24.0).reshape(3, 4, 2)
    for statistic in (protocols.mean, protocols.median_of_tasks, protocols.iqm):
        assert np.allclose(statistic(batch), [float(statistic(one)) for one in batch])


def test_median_of_tasks_takes_means_over_runs_first() -> None:
    assert float(protocols.median_of_tasks([[0.0, 10.0, 5.0], [2.0, 0.0, 5.0]])) == 5.0  # task means 1, 5, 5


def test_bootstrap_of_two_values_is_binomial() -> None:
    # The mean of two draws from {0, 1} is 0, 1/2, 1 with probability 1/4, 1/2, 1/4.
    pair = [[0.0], [1.0]]
    assert protocols.stratified_bootstrap(pair, level=0.95) == (0.0, 1.0)
    assert protocols.stratified_bootstrap(pair, level=0.4) == (0.5, 0.5)
    assert protocols.mean_interval([0.0, 1.0], level=0.4) == (0.5, 0.5, 0.5)


def test_bootstrap_approaches_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    centre, low, high = protocols.mean_interval(values)
    standard_error = values.std() / math.sqrt(len(values))
    assert centre == pytest.approx(values.mean())
    assert (centre - low) / standard_error == pytest.approx(1.96, abs=0.15)
    assert (high - centre) / standard_error == pytest.approx(1.96, abs=0.15)


def test_strata_keep_the_difference_between_tasks_out_of_the_interval() -> None:
    scores = np.array([[1.0, 3.0]] * 5)
    assert protocols.stratified_bootstrap(scores) == (2.0, 2.0)
    low, high = protocols.stratified_bootstrap(scores.reshape(-1, 1))
    assert low < 1.6
    assert high > 2.4


def test_runs_of_different_tasks_are_drawn_apart() -> None:
    # Drawn together, the mean of (0, 1) and (1, 0) would always be 1/2.
    low, high = protocols.stratified_bootstrap([[0.0, 1.0], [1.0, 0.0]])
    assert (low, high) == (0.0, 1.0)


def test_bootstrap_is_a_function_of_its_arguments_and_draws_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(30, 3))
    assert protocols.stratified_bootstrap(values) == protocols.stratified_bootstrap(values)
    assert protocols.stratified_bootstrap(values, seed=1) != protocols.stratified_bootstrap(values, seed=2)
    sizes: list[int] = []

    def counting(drawn: np.ndarray) -> np.ndarray:
        sizes.append(len(drawn))
        return protocols.mean(drawn)

    protocols.stratified_bootstrap(np.zeros((4000, 1)), counting, resamples=2500)
    assert sizes == [1000, 1000, 500]


def test_values_that_are_not_finite_are_left_out_or_refused() -> None:
    assert protocols.mean_interval([math.nan, 2.0, math.inf]) == (2.0, 2.0, 2.0)
    assert all(math.isnan(number) for number in protocols.mean_interval([]))
    for bad in ([[math.nan]], [], [1.0, 2.0]):
        with pytest.raises(ValueError, match="bootstrap needs"):
            protocols.stratified_bootstrap(bad)
