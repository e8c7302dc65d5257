import pytest
import torch

from agents.returns import advantages, linear_recurrence, returns
from agents.schedules import linear


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def flags(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


def test_termination_adds_up_discounted_rewards():
    value = returns(column(1, 2, 4), column(1, 1, 0), flags(0, 0, 1), column(9, 9, 9), gamma=0.5)
    assert value.tolist() == [1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4]


def test_lost_life_keeps_the_next_lifes_reward_out():
    value = returns(column(1, 2, 4, 8), column(1, 0, 1, 0), flags(0, 0, 0, 1), column(9, 9, 9, 9), gamma=1.0)
    assert value.tolist() == [3, 2, 12, 8]


def test_time_limit_bootstraps_from_the_true_successor():
    value = returns(column(1, 2, 4), column(1, 1, 1), flags(0, 1, 1), column(100, 10, 20), gamma=0.5)
    assert value.tolist() == [1 + 0.5 * (2 + 0.5 * 10), 2 + 0.5 * 10, 4 + 0.5 * 20]


def test_final_row_bootstraps_where_the_trace_goes_on():
    assert returns(column(1, 2), column(1, 1), flags(0, 0), column(7, 3), gamma=1.0).tolist() == [6, 5]


def test_two_episodes_in_one_lane_do_not_mix():
    value = returns(column(1, 1, 1, 1), column(1, 0, 1, 0), flags(0, 1, 0, 1), column(0, 0, 0, 0), gamma=1.0)
    assert value.tolist() == [2, 1, 2, 1]


def test_lanes_are_independent_and_equal_to_a_plain_loop():
    torch.manual_seed(0)
    reward, next_value = torch.randn(37, 5, dtype=torch.float64), torch.randn(37, 5, dtype=torch.float64)
    last, discount = torch.rand(37, 5) < 0.1, (torch.rand(37, 5) > 0.1).double()
    expected = torch.zeros_like(reward)
    for lane in range(5):
        following = 0.0
        for t in reversed(range(37)):
            beyond = next_value[t, lane] if last[t, lane] or t == 36 else following
            following = reward[t, lane] + 0.9 * discount[t, lane] * beyond
            expected[t, lane] = following
    torch.testing.assert_close(returns(reward, discount, last, next_value, 0.9), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 1000])
def test_recurrence_equals_a_plain_loop(length):
    torch.manual_seed(length)
    x, decay = torch.randn(length, dtype=torch.float64), torch.rand(length, dtype=torch.float64)
    expected, following = [], 0.0
    for t in reversed(range(length)):
        following = float(x[t]) + float(decay[t]) * following
        expected.append(following)
    torch.testing.assert_close(linear_recurrence(x, decay), torch.tensor(expected[::-1], dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_recurrence_leaves_its_arguments_alone():
    x, decay = torch.ones(8), torch.ones(8)
    assert linear_recurrence(x, decay).tolist() == [8, 7, 6, 5, 4, 3, 2, 1]
    assert x.tolist() == [1] * 8
    assert decay.tolist() == [1] * 8


def test_endless_ring_is_worth_one_over_one_minus_gamma_through_time_limits():
    """V = 1 / (1 - gamma) is the fixed point: with it as next_value, each return equals it, however the trace is cut."""
    gamma, worth = 0.9, 10.0
    last = flags(0, 0, 1, 0, 1, 0, 0, 1)
    value = returns(torch.ones(8, dtype=torch.float64), torch.ones(8), last, torch.full((8,), worth, dtype=torch.float64), gamma)
    torch.testing.assert_close(value, torch.full((8,), worth, dtype=torch.float64), rtol=0, atol=1e-12)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shape"):
        linear_recurrence(torch.ones(3), torch.ones(2))


@pytest.mark.parametrize(("frame", "value"), [(0, 1.0), (500, 0.55), (1000, 0.1), (9000, 0.1), (-5, 1.0)])
def test_linear_schedule(frame, value):
    assert linear(frame, 1.0, 0.1, 1000) == pytest.approx(value)


def test_linear_schedule_over_no_time_is_its_end():
    assert linear(0, 1.0, 0.1, 0) == 0.1


def advantage(reward, discount, last, value, next_value, gamma, trace):
    return advantages(column(*reward), column(*discount), flags(*last), column(*value), column(*next_value), gamma, trace).tolist()


def test_advantages_with_trace_0_look_one_step_ahead():
    found = advantage([1, 2, 4], [1, 1, 1], [0, 0, 0], [10, 20, 40], [7, 7, 80], gamma=0.5, trace=0.0)
    assert found == [1 + 10 - 10, 2 + 20 - 20, 4 + 40 - 40]


def test_advantages_decay_with_gamma_and_trace():
    found = advantage([1, 2, 4], [1, 1, 0], [0, 0, 1], [0, 0, 0], [9, 9, 9], gamma=0.5, trace=0.5)
    assert found == [1 + 0.25 * (2 + 0.25 * 4), 2 + 0.25 * 4, 4]


def test_advantages_stop_at_a_lost_life_and_bootstrap_at_a_time_limit():
    found = advantage([1, 2, 4, 8], [1, 0, 1, 1], [0, 0, 1, 0], [3, 5, 7, 9], [100, 100, 10, 20], gamma=1.0, trace=1.0)
    assert found == [1 + 2 - 3, 2 - 5, 4 + 10 - 7, 8 + 20 - 9]


def test_advantages_of_several_episodes_in_a_row():
    found = advantage([1, 1, 1, 1, 1], [1, 0, 0, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [9, 9, 9, 9, 5], gamma=1.0, trace=1.0)
    assert found == [2, 1, 1, 7, 6]


def test_advantages_with_trace_1_are_returns_less_values():
    torch.manual_seed(1)
    reward, value, next_value = torch.randn(3, 23, 4, dtype=torch.float64)
    last, discount = torch.rand(23, 4) < 0.2, (torch.rand(23, 4) > 0.2).double()
    found = advantages(reward, discount, last, value, next_value, 0.9)
    torch.testing.assert_close(found + value, returns(reward, discount, last, next_value, 0.9), rtol=0, atol=1e-12)


def test_advantages_equal_a_plain_loop():
    torch.manual_seed(2)
    reward, value, next_value = torch.randn(3, 19, 3, dtype=torch.float64)
    last, discount = torch.rand(19, 3) < 0.2, (torch.rand(19, 3) > 0.2).double()
    expected, ahead = torch.zeros_like(reward), torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(19)):
        ends = last[t] if t < 18 else torch.ones(3, dtype=torch.bool)
        following = torch.where(ends, next_value[t], value[min(t + 1, 18)])
        ahead = reward[t] + 0.9 * discount[t] * following - value[t] + 0.9 * 0.8 * discount[t] * ~ends * ahead
        expected[t] = ahead
    torch.testing.assert_close(advantages(reward, discount, last, value, next_value, 0.9, 0.8), expected, rtol=0, atol=1e-12)
