"""STRAW's plans, against closed forms and a second telling in plain loops."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Normal, kl_divergence

from envs.api import UserError
from generative.api import Model, Planner
from generative.straw import Straw, gaussian_filters, kl_to_normal, made_anew, time_shift

CPU = torch.device("cpu")
ACTIONS, STEPS, FILTERS, FEATURES = 3, 6, 4, 5


def straw(features: int = FEATURES, **knobs) -> Straw:
    small = {"plan_steps": STEPS, "filters": FILTERS, "hidden": 7, "largest_logit": 3.0}
    planner = Straw((1, 8, 8), ACTIONS, CPU, **small | knobs)
    planner.connect(features)
    return planner


def lively(planner: Straw) -> Straw:
    """Larger parameters, so that every term counts."""
    for parameter in planner.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    planner.bias.data.fill_(-0.3)
    return planner


def scripted(chances: list[float], lanes: int = 2) -> torch.Tensor:
    """A plan of random logits whose commitment-plan is as said."""
    plan = torch.randn(lanes, ACTIONS + 1, STEPS)
    plan[:, -1] = torch.tensor(chances)
    return plan


def plain_filters(position: float, stride: float, variance: float, filters: int, steps: int) -> list[list[float]]:
    rows = []
    for k in range(1, filters + 1):
        centre = position + (k - filters / 2 - 0.5) * stride
        heights = [math.exp(-((t - centre) ** 2) / (2 * variance)) for t in range(steps)]
        rows.append([height / sum(heights) for height in heights])
    return [[row[t] for row in rows] for t in range(steps)]


def test_is_a_planner():
    assert isinstance(straw(), Planner)
    assert isinstance(straw(), Model)


def test_shift_drops_the_first_column_and_appends_zeros():
    assert time_shift(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).tolist() == [[2, 3, 0], [5, 6, 0]]


def test_one_filter_by_hand():
    """Variance 1 / (2 ln 2): heights 1/2, 1, 1/2 around the centre."""
    found = gaussian_filters(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([-math.log(2 * math.log(2))]), 1, 3)
    torch.testing.assert_close(found[0, :, 0], torch.tensor([0.25, 0.5, 0.25]))


def test_two_filters_by_hand():
    """A stride of 2 around 1: centres on columns 0 and 2."""
    wide = -math.log(2 * math.log(2))
    found = gaussian_filters(torch.tensor([1.0]), torch.tensor([math.log(2.0)]), torch.tensor([wide]), 2, 3)
    expected = torch.tensor([[16.0, 1.0], [8.0, 8.0], [1.0, 16.0]]) / 25
    torch.testing.assert_close(found[0], expected)


def test_filters_sum_to_one_wherever_they_are():
    position, log_stride, log_variance = (
        torch.tensor([-1e5, 0.0, 3.0, 1e5]),
        torch.tensor([0.0, -50.0, 50.0, 1.0]),
        torch.tensor([0.0, -50, 50, 1]),
    )
    found = gaussian_filters(position, log_stride, log_variance, 5, 9)
    assert found.shape == (4, 9, 5)
    torch.testing.assert_close(found.sum(1), torch.ones(4, 5))
    assert float(found[0, 0].min()) == float(found[3, -1].min()) == 1  # out of sight: the nearest column


def test_the_narrowest_filter_between_two_columns_has_a_bounded_slope():
    """Of two columns the second gets sigmoid(precision (position - 1/2)), whose slope is a quarter of the precision, at most e^2."""
    position = torch.tensor([0.5], requires_grad=True)
    gaussian_filters(position, torch.tensor([0.0]), torch.tensor([-50.0]), 1, 2)[0, 1, 0].backward()
    assert float(position.grad) == pytest.approx(math.exp(2) / 4)


@pytest.mark.parametrize("filters", [1, 4])
def test_filters_equal_plain_loops(filters):
    position, log_stride, log_variance = torch.randn(3) + 2, torch.randn(3), torch.randn(3)
    found = gaussian_filters(position, log_stride, log_variance, filters, 7)
    for b in range(3):
        expected = plain_filters(float(position[b]), math.exp(float(log_stride[b])), math.exp(float(log_variance[b])), filters, 7)
        torch.testing.assert_close(found[b], torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_kl_is_that_of_torch():
    mean, log_std = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(1)
    torch.testing.assert_close(kl_to_normal(mean, log_std), expected)


def test_empty_plan_and_the_first_step_plans():
    planner = straw()
    plan = planner.start(50)
    assert plan.shape == (50, ACTIONS + 1, STEPS)
    assert plan.dtype == torch.float32
    assert plan[0, -1].tolist() == [1] + [0] * (STEPS - 1)
    assert not plan[:, :-1].any()
    step = planner.advance(torch.randn(50, FEATURES), plan)
    assert bool(step.replanned.all())
    assert step.logits.shape == (50, ACTIONS)


def test_a_scripted_plan_is_followed_to_the_letter():
    """c says: not for four steps, then surely."""
    planner, plan = lively(straw()), scripted([0, 0, 0, 0, 1, 0])
    script = plan.clone()
    for t in range(1, 5):
        step = planner.advance(torch.randn(2, FEATURES), plan)
        assert not step.replanned.any()
        assert torch.equal(step.logits, script[:, :-1, t])
        plan = step.plan
    assert torch.equal(plan[:, :-1], torch.nn.functional.pad(script[:, :-1, 4:], (0, 4)))
    assert plan[0, -1].tolist() == [1, 0, 0, 0, 0, 0]
    step = planner.advance(torch.randn(2, FEATURES), plan)
    assert bool(step.replanned.all())
    assert not torch.equal(step.logits, script[:, :-1, 5])


def test_plans_that_add_up_stay_bounded_and_keep_their_gradient():
    """Writes that grow with what is read, at every step of a long episode."""
    planner = lively(straw(noise=False, largest_logit=2.0))
    for layer in (planner.first, planner.second, planner.write):
        layer.weight.data.abs_().mul_(5)
    plan, features = planner.start(2), torch.randn(2, FEATURES)
    for _ in range(100):
        plan = plan.detach()
        plan[:, -1, 0] = 1
        plan = planner.advance(features, plan).plan
    assert float(plan.detach()[:, :-1].max()) == 2
    (slope,) = torch.autograd.grad(plan[:, 0, 0].sum(), planner.write.bias)
    assert bool(slope[: planner.filters].any())


def test_a_bound_holds_back_only_what_pushes_outwards():
    planner, plan = straw(noise=False, largest_logit=3.0), scripted([1, 0, 0, 0, 0, 0], 1)
    torch.nn.init.zeros_(planner.write.weight)
    torch.nn.init.zeros_(planner.write.bias)  # so that the new plan is the old one, shifted and held
    plan[0, 0, 1:4] = torch.tensor([5.0, -5.0, 1.0])
    plan.requires_grad_()
    new = planner.advance(torch.randn(1, FEATURES), plan).plan
    assert new[0, 0, :3].tolist() == [3, -3, 1]
    for sign, expected in ((1.0, [1, 0, 1]), (-1.0, [0, -1, -1])):  # a step down sign * x
        (slope,) = torch.autograd.grad(sign * new[0, 0].sum(), plan, retain_graph=True)
        assert slope[0, 0, 1:4].tolist() == expected


def test_a_plan_tells_whether_it_was_made_anew():
    planner, plan = lively(straw()), torch.cat([scripted([1, 0, 0, 0, 0, 0], 1), scripted([0, 1, 1, 1, 1, 1], 1)])
    step = planner.advance(torch.randn(2, FEATURES), plan)
    assert made_anew(step.plan).tolist() == step.replanned.tolist() == [True, False]


def test_gate_opens_as_often_as_it_is_said():
    step = straw().advance(torch.randn(20_000, FEATURES), scripted([0.3] + [0] * 5, 20_000))
    assert float(step.replanned.float().mean()) == pytest.approx(0.3, abs=0.015)
    assert torch.equal(step.replanned, step.noise[:, 0] < 0.3)


def plain_step(planner: Straw, z: torch.Tensor, plan: torch.Tensor, noise: torch.Tensor, gate: bool):
    """One lane's new action-plan rows, commitment-plan and KL, told in loops over columns, for torch to differentiate."""
    actions, c = [list(row) for row in plan[:-1]], list(plan[-1])
    divergence = z.new_zeros(())
    if planner.noise:
        mean, std = planner.mean(z), planner.log_std(z).exp()
        divergence = kl_divergence(Normal(mean, std), Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum()
        z = mean + std * noise[1:]
    moved = [[*row[1:], torch.zeros(())] for row in actions]
    if not gate:
        return moved, [*c[1:], torch.zeros(())], divergence

    def grid(position, stride, variance, filters):
        centres = [position + (k - filters / 2 - 0.5) * stride for k in range(1, filters + 1)]
        heights = [[torch.exp(-((t - centre) ** 2) / (2 * variance)) for t in range(len(c))] for centre in centres]
        return [[height / sum(row) for height in row] for row in heights]  # K of T

    psi = planner.attend(z)
    attention = grid(psi[0], psi[1].exp(), psi[2].exp(), planner.filters)
    seen = [sum(row[t] * weights[t] for t in range(len(c))) for row in actions for weights in attention]
    xi = torch.relu(planner.second(torch.relu(planner.first(torch.cat([torch.stack(seen), z])))))
    writing = planner.write(xi)
    for a, row in enumerate(moved):
        for t in range(len(c)):
            row[t] = row[t] + sum(writing[a * planner.filters + k] * weights[t] for k, weights in enumerate(attention))
    psi_c = planner.commit(torch.cat([psi, xi]))
    (where,) = grid(len(c) / (1 + torch.exp(-psi_c[0])) - 0.5, 1.0, 1 + psi_c[1].exp(), 1)
    return moved, [torch.sigmoid(planner.bias[0] + 40 * weight) for weight in where], divergence


@pytest.mark.parametrize("noisy", [True, False])
def test_a_step_and_its_cost_equal_plain_loops(noisy):
    torch.manual_seed(1)
    planner, plan = lively(straw(noise=noisy, kl_cost=0.3, replan_cost=0.7)).double(), scripted([0.5, 0.2, 0.9, 0.1, 0.4, 0.6], 6).double()
    features = torch.randn(6, FEATURES).double()
    step = planner.advance(features, plan)
    assert 0 < int(step.replanned.sum()) < 6
    assert step.noise.shape == (6, 1 + FEATURES if noisy else 1)
    for b in range(6):
        actions, c, divergence = plain_step(planner, features[b], plan[b], step.noise[b], bool(step.replanned[b]))
        bound = 3 if step.replanned[b] else math.inf
        expected = torch.stack([*(torch.stack(row).clamp(-bound, bound) for row in actions), torch.stack(c)])
        torch.testing.assert_close(step.plan[b], expected)
        assert torch.equal(step.logits[b], step.plan[b, :-1, 0])
        torch.testing.assert_close(step.cost[b], 0.3 * divergence * step.replanned[b] + 0.7 * c[0])


def test_gradient_goes_straight_through_the_gate():
    """dL/dc_1 of the plan before is what the gate is worth, opened or not: dL/dA times the difference of action-plans, and the KL."""
    torch.manual_seed(1)
    planner, plan = (
        lively(straw(kl_cost=0.3, replan_cost=0.7)).double(),
        scripted([0.5, 0.2, 0.9, 0.1, 0.4, 0.6], 6).double().requires_grad_(),
    )
    features, weights = torch.randn(6, FEATURES).double(), torch.randn(6, ACTIONS + 1, STEPS)
    step = planner.advance(features, plan)
    (found,) = torch.autograd.grad((step.plan * weights).sum() + step.cost.sum(), plan)
    assert 0 < int(step.replanned.sum()) < 6
    for b in range(6):
        both = []
        for gate in (False, True):
            actions, c, divergence = plain_step(planner, features[b], plan[b].detach(), step.noise[b], gate)
            both.append(torch.stack([*(torch.stack(row).clamp(-3, 3) if gate else torch.stack(row) for row in actions), torch.stack(c)]))
        difference = both[1] - both[0]
        expected = (weights[b, :-1] * difference[:-1]).sum() + 0.3 * divergence
        torch.testing.assert_close(found[b, -1, 0], expected.detach())


def test_noise_given_back_repeats_bit_for_bit():
    planner, plan, features = lively(straw()), scripted([0.5] * STEPS, 8), torch.randn(8, FEATURES)
    first = planner.advance(features, plan)
    state = torch.random.get_rng_state()
    again = planner.advance(features, plan, first.noise)
    assert torch.equal(torch.random.get_rng_state(), state)
    for one, other in zip(first, again):
        assert torch.equal(one, other)
    assert not torch.equal(planner.advance(features, plan).noise, first.noise)


@pytest.mark.parametrize("noisy", [True, False])
def test_gradients_are_those_of_finite_differences(noisy):
    """Of features and of all parameters, where the gate stays as it is."""
    torch.manual_seed(2)
    planner = lively(straw(noise=noisy, kl_cost=0.3, replan_cost=0.7)).double()
    plan = torch.cat([torch.randn(2, ACTIONS, STEPS), torch.tensor([[[0.0] + [0.4] * 5], [[1.0] + [0.4] * 5]])], 1).double()
    features = torch.randn(2, FEATURES).double().requires_grad_()
    noise = planner.advance(features, plan).noise
    names = [name for name, _ in planner.named_parameters()]

    def outputs(features, *parameters):
        step = torch.func.functional_call(planner, dict(zip(names, parameters)), (features, plan, noise), strict=False)
        return step.plan, step.cost

    planner.forward = planner.advance
    assert gradcheck(outputs, (features, *(parameter.detach().requires_grad_() for parameter in planner.parameters())))


def test_gradient_of_the_plan_before_is_that_of_the_shift_alone():
    """What is read of it has none, whether the gate opened or not."""
    planner, plan = lively(straw()), torch.cat([scripted([1, 0, 0, 0, 0, 0], 1), scripted([0] * STEPS, 1)]).requires_grad_()
    step = planner.advance(torch.randn(2, FEATURES), plan)
    assert step.replanned.tolist() == [True, False]
    weights = torch.randn(2, ACTIONS, STEPS)
    (found,) = torch.autograd.grad((step.plan[:, :-1] * weights).sum(), plan)
    assert torch.equal(found[:, :-1], torch.nn.functional.pad(weights[..., :-1], (1, 0)))


def test_gradient_flows_from_a_followed_column_to_the_features_that_it_was_planned_from():
    planner, seen = lively(straw(noise=False)), torch.randn(1, FEATURES, requires_grad=True)
    plan = planner.advance(seen, planner.start(1)).plan
    closed = torch.cat([plan[:, :-1], torch.zeros(1, 1, STEPS)], 1)
    for _ in range(2):
        step = planner.advance(torch.randn(1, FEATURES), closed)
        closed = step.plan
    assert not step.replanned.any()
    (gradient,) = torch.autograd.grad(step.logits.square().sum(), seen)
    assert float(gradient.abs().sum()) > 0


def test_filters_start_on_the_first_columns_and_the_commitment_in_their_midst():
    planner = straw(plan_steps=50, filters=5)
    for layer in (planner.attend, planner.commit):
        layer.weight.data.zero_()
    with torch.no_grad():
        step = planner.advance(torch.randn(1, FEATURES), planner.start(1))
    assert int(step.plan[0, -1].argmax()) == 2
    assert float(step.plan[0, -1, 40]) == pytest.approx(1 / (1 + math.e))  # sigmoid(b), far from the filter
    assert float(step.plan[0, :-1, 20:].abs().max()) < 1e-6


def test_plans_are_float32_whatever_the_parameters_are():
    planner = straw().bfloat16()
    assert planner.start(2).dtype == torch.float32
    step = planner.advance(torch.randn(2, FEATURES, dtype=torch.bfloat16), planner.start(2))
    assert {part.dtype for part in step} == {torch.float32, torch.bool}


@pytest.mark.parametrize(
    ("knob", "bad"),
    [
        ("plan_steps", 0),
        ("plan_steps", 10_001),
        ("filters", 0),
        ("filters", 101),
        ("hidden", 0),
        ("kl_cost", -1.0),
        ("kl_cost", math.nan),
        ("largest_logit", 0.0),
        ("replan_cost", -1e-3),
        ("replan_cost", 1e30),
    ],
)
def test_wrong_knobs_are_named(knob, bad):
    with pytest.raises(UserError, match=rf"^planner\.{knob} must be .*, got ") as trouble:
        straw(**{knob: bad})
    assert "\n" not in str(trouble.value)


@pytest.mark.parametrize(
    ("actions", "steps", "filters", "hidden", "features", "noise"),
    [(3, 6, 3, 8, 16, True), (18, 500, 10, 128, 64, True), (4, 12, 5, 32, 16, False), (4, 2000, 1, 16, 8, False), (2, 10, 100, 8, 8, True)],
)
def test_what_a_rollout_holds_is_told(actions, steps, filters, hidden, features, noise):
    """By what autograd saves and what is handed back, no byte counted twice."""
    planner = Straw((1, 4, 4), actions, "cpu", plan_steps=steps, filters=filters, hidden=hidden, noise=noise)
    planner.connect(features)
    own, held = {parameter.untyped_storage().data_ptr() for parameter in planner.parameters()}, {}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor  # and so no address is given twice
        return tensor

    plan = planner.start(4)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        for _ in range(5):
            step = planner.advance(torch.randn(4, features, requires_grad=True), plan)
            plan = step.plan
            for part in step:
                hold(part)
    taken = sum(tensor.untyped_storage().nbytes() for place, tensor in held.items() if place not in own)
    assert 0.3 * planner.required_bytes(4 * 5) < taken <= planner.required_bytes(4 * 5)
