import numpy as np
import pytest
import torch

from agents.dictionary import Dictionaries, Near, kernel_read
from envs.api import UserError

CPU = torch.device("cpu")


def small(**knobs) -> Dictionaries:
    knobs = {"num_actions": 2, "dims": 1, "capacity": 4, "k": 2, "delta": 0.5, "alpha": 0.25, "device": CPU, "search": "torch"} | knobs
    return Dictionaries(**knobs)


def write(memory: Dictionaries, action: int, keys: list[float], hashes: list[int], values: list[float]) -> None:
    memory.write(torch.full((len(keys),), action), torch.tensor(keys).view(-1, 1), torch.tensor(hashes), torch.tensor(values))


def ask(memory: Dictionaries, key: float):
    return memory.estimate(torch.tensor([[key]]))


def held(memory: Dictionaries, action: int) -> dict[float, float]:
    """The values by their keys."""
    table = memory.state_dict()["tables"][str(action)]
    return dict(zip(table["keys"][:, 0].tolist(), table["values"].tolist()))


def filled(search: str = "torch", entries: int = 900, **knobs) -> Dictionaries:
    """Three dictionaries with `entries` random entries together, keys of 5 numbers and 7 neighbours."""
    memory = small(**{"num_actions": 3, "dims": 5, "capacity": 400, "k": 7, "search": search} | knobs)
    for part in range(0, entries, 100):
        hashes = torch.arange(part, part + 100)
        memory.write(torch.randint(3, (100,)), torch.randn(100, 5) * 3, hashes, torch.randn(100))
    return memory


def dense(memory: Dictionaries, queries: torch.Tensor) -> np.ndarray:
    """What the dictionaries say, in numpy float64, from all entries."""
    answer = np.zeros((len(queries), memory.num_actions))
    for action in range(memory.num_actions):
        table = memory.state_dict()["tables"][str(action)]
        keys, values = table["keys"].double().numpy(), table["values"].double().numpy()
        for row, query in enumerate(queries.double().numpy()):
            squared = ((keys - query) ** 2).sum(1)
            near = np.argsort(squared, kind="stable")[: memory.k]
            kernel = 1 / (squared[near] + memory.delta)
            answer[row, action] = (kernel / kernel.sum() * values[near]).sum() if len(near) else 0
    return answer


# Reading


def test_a_read_by_hand():
    memory = small()
    write(memory, 0, [0.0, 1.0, 9.0], [1, 2, 3], [2.0, 8.0, 100.0])
    reading = ask(memory, 0.0)  # kernels 1 / 0.5 and 1 / 1.5
    assert float(reading.value[0, 0]) == pytest.approx((2 * 2 + 8 / 1.5) / (2 + 1 / 1.5))
    assert reading.rows[0].tolist() == [[0, 1], [-1, -1]]
    assert reading.value[0, 1] == 0


def test_all_are_read_where_there_are_fewer_than_k():
    memory = small(k=3)
    write(memory, 1, [0.0], [1], [7.0])
    assert float(ask(memory, 5.0).value[0, 1]) == pytest.approx(7.0)
    assert ask(memory, 5.0).rows[0].tolist() == [[-1, -1, -1], [0, -1, -1]]
    write(memory, 1, [1.0], [2], [1.0])
    assert float(ask(memory, 0.5).value[0, 1]) == pytest.approx(4.0)


@pytest.mark.parametrize("search", ["torch", "scan"])
@pytest.mark.parametrize("entries", [0, 100, 900])
def test_reads_equal_a_dense_computation(search, entries):
    torch.manual_seed(entries)
    memory, queries = filled(search, entries, k=50), torch.randn(20, 5) * 3
    np.testing.assert_allclose(memory.estimate(queries).value.numpy(), dense(memory, queries), rtol=1e-5, atol=1e-6)


def test_estimating_changes_nothing():
    memory = filled()
    before = {name: column.clone() for name, column in memory.state_dict()["tables"]["0"].items()}
    memory.estimate(torch.randn(4, 5))
    assert all(torch.equal(before[name], column) for name, column in memory.state_dict()["tables"]["0"].items())


# Writing


def test_a_known_pair_moves_by_alpha_and_takes_the_present_key():
    memory = small()
    write(memory, 0, [0.0, 5.0], [100, 101], [4.0, 1.0])
    write(memory, 0, [0.5], [100], [8.0])
    assert held(memory, 0) == {0.5: 5.0, 5.0: 1.0}
    write(memory, 1, [0.5], [100], [3.0])  # the same frame under another action
    assert held(memory, 0) == {0.5: 5.0, 5.0: 1.0}
    assert held(memory, 1) == {0.5: 3.0}
    assert ask(memory, 0.5).rows[0, 0].tolist() == [0, 1]


def test_a_pair_that_comes_twice_in_one_write_is_written_in_turn():
    memory = small()
    write(memory, 0, [0.0, 3.0, 1.0, 2.0], [100, 103, 100, 100], [4.0, 9.0, 8.0, 1.0])
    assert held(memory, 0) == {2.0: (4 + 0.25 * 4) + 0.25 * (1 - 5), 3.0: 9.0}


def test_a_full_dictionary_gives_up_what_was_a_neighbour_longest_ago():
    memory = small()
    for number in range(4):
        write(memory, 0, [float(number)], [100 + number], [0.0])
    memory.touch(ask(memory, -5.0).rows)  # 0 and 1
    write(memory, 0, [8.0], [108], [0.0])  # 2 was written before 3, neither was a neighbour
    assert set(held(memory, 0)) == {0.0, 1.0, 3.0, 8.0}
    write(memory, 0, [9.0], [109], [0.0])
    assert set(held(memory, 0)) == {0.0, 1.0, 8.0, 9.0}
    memory.touch(ask(memory, 0.9).rows)
    write(memory, 0, [8.5], [108], [0.0])  # known: moves, and counts as a neighbour
    write(memory, 0, [7.0], [107], [0.0])
    assert set(held(memory, 0)) == {0.0, 1.0, 8.5, 7.0}
    assert memory.sizes == [4, 0]


def test_a_forgotten_frame_is_appended_anew():
    memory = small(capacity=2)
    for number in range(3):
        write(memory, 0, [float(number)], [100 + number], [4.0])
    write(memory, 0, [0.0], [100], [8.0])
    assert held(memory, 0) == {0.0: 8.0, 2.0: 4.0}


def test_no_more_than_the_capacity_is_held_and_announced():
    torch.manual_seed(0)
    memory = small(num_actions=3, dims=64, capacity=300, k=5, search="scan")
    for count in range(1, 20):
        actions = torch.randint(3, (100,)) if count < 10 else torch.zeros(100, dtype=torch.int64)
        memory.write(actions, torch.randn(100, 64), torch.randint(2**62, (100,)), torch.zeros(100))
        assert max(memory.sizes) <= 300
        taken = sum(column.nbytes for table in memory.tables for column in table.columns().values())
        assert taken < memory.nbytes <= memory.required_bytes(100 * count)
    write(memory := small(capacity=3), 0, [float(t) for t in range(10)], list(range(10)), [0.0] * 10)
    assert set(held(memory, 0)) == {7.0, 8.0, 9.0}


@pytest.mark.parametrize("search", ["torch", "scan"])
def test_a_dictionary_that_has_grown_reads_and_learns_as_a_small_one(search):
    torch.manual_seed(10)
    memory = small(num_actions=1, dims=5, capacity=5000, k=7, search=search)
    for part in range(9):
        memory.write(torch.zeros(700, dtype=torch.int64), torch.randn(700, 5) * 3, torch.arange(700) + 600 * part, torch.randn(700))
        queries = torch.randn(8, 5) * 3
        descend(memory, queries, torch.zeros(8, dtype=torch.int64), torch.randn(8))
        np.testing.assert_allclose(memory.estimate(queries).value.numpy(), dense(memory, queries), rtol=1e-4, atol=1e-5)
    table = memory.tables[0]
    assert table.size == 5000
    assert 7 <= int((table.moments[:, 0] > 0).sum()) <= 9 * 8 * 7


# Gradients


def near_of(queries: int, entries: int, dims: int, dtype: torch.dtype) -> tuple[torch.Tensor, Near]:
    keys, values = torch.randn(queries, entries, dims, dtype=dtype), torch.randn(queries, entries, dtype=dtype)
    known = torch.rand(queries, entries) < 0.7
    known[:, 0] = True
    return torch.randn(queries, dims, dtype=dtype), Near(keys, values, known)


def test_gradients_of_the_read_equal_finite_differences():
    torch.manual_seed(1)
    query, near = near_of(3, 6, 4, torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (query, near.keys, near.values)]
    assert torch.autograd.gradcheck(lambda q, k, v: kernel_read(q, Near(k, v, near.known), 1e-3), inputs)
    gradients = torch.autograd.grad(kernel_read(query, near, 1e-3).sum(), inputs)
    for gradient in gradients[1:]:
        assert bool((gradient[near.known] != 0).all())
        assert bool((gradient[~near.known] == 0).all())


def descend(memory: Dictionaries, queries: torch.Tensor, actions: torch.Tensor, goals: torch.Tensor, rate: float = 0.1) -> torch.Tensor:
    """One step towards `goals` with RMSProp's decay 0.9 and epsilon 0.01. The loss before it."""
    wanted = torch.nn.functional.one_hot(actions, memory.num_actions).bool()
    rows = memory.nearest(queries, wanted)[torch.arange(len(actions)), actions]
    near = memory.near(actions, rows)
    keys, values = near.keys.requires_grad_(), near.values.requires_grad_()
    loss = 0.5 * (kernel_read(queries, near, memory.delta) - goals).square().mean()
    memory.descend(actions, rows, torch.autograd.grad(loss, (keys, values)), rate, 0.9, 0.01)
    return loss.detach()


def test_a_step_of_all_entries_equals_autograd_on_the_whole_tables():
    """All entries are neighbours of all queries, so the loss is a dense function of whole tables."""
    torch.manual_seed(2)
    memory = filled(entries=100, num_actions=3, capacity=60, k=60)
    assert max(memory.sizes) <= 60
    tables = [{name: column.clone() for name, column in memory.state_dict()["tables"][str(a)].items()} for a in range(3)]
    leaves = [[table[name].requires_grad_() for name in ("keys", "values")] for table in tables]
    queries, actions, goals = torch.randn(8, 5), torch.tensor([0, 1, 1, 0, 0, 1, 0, 0]), torch.randn(8)
    read = []
    for query, action in zip(queries, actions.tolist()):
        keys, values = leaves[action]
        kernel = 1 / ((keys - query).square().sum(1) + memory.delta)
        read.append((kernel * values).sum() / kernel.sum())
    loss = 0.5 * (torch.stack(read) - goals).square().mean()
    gradients = torch.autograd.grad(loss, [leaf for pair in leaves[:2] for leaf in pair])
    assert float(descend(memory, queries, actions, goals)) == pytest.approx(float(loss.detach()), rel=1e-5)
    for action in range(2):
        key, value = gradients[2 * action : 2 * action + 2]
        assert bool((key != 0).all() and (value != 0).all())
        squares = 0.1 * torch.stack([key.square().mean(1), value.square()], 1)
        after = memory.state_dict()["tables"][str(action)]
        torch.testing.assert_close(after["moments"], squares)
        moved = leaves[action][0].detach() - 0.1 * key / (squares[:, :1].sqrt() + 0.01)
        torch.testing.assert_close(after["keys"], moved, rtol=1e-4, atol=1e-6)
        moved = leaves[action][1].detach() - 0.1 * value / (squares[:, 1].sqrt() + 0.01)
        torch.testing.assert_close(after["values"], moved, rtol=1e-4, atol=1e-6)
    untouched = memory.state_dict()["tables"]["2"]
    assert all(torch.equal(untouched[name], tables[2][name]) for name in untouched)


def test_an_entry_that_takes_the_place_of_another_has_moments_of_its_own():
    memory = small(capacity=2)
    write(memory, 0, [0.0, 1.0], [1, 2], [2.0, 8.0])
    descend(memory, torch.tensor([[0.3]]), torch.tensor([0]), torch.tensor([9.0]))
    moments = memory.tables[0].moments
    assert bool((moments[:2] > 0).all())
    memory.touch(torch.tensor([[[0, -1], [-1, -1]]]))
    write(memory, 0, [5.0], [3], [1.0])
    assert moments[1].tolist() == [0.0, 0.0]
    assert bool((moments[0] > 0).all())


def test_steps_lower_the_loss():
    torch.manual_seed(3)
    memory, queries, actions, goals = filled(), torch.randn(20, 5) * 3, torch.arange(20) % 3, torch.randn(20)
    losses = [float(descend(memory, queries, actions, goals, rate=0.05)) for _ in range(60)]
    assert losses[-1] < losses[0] / 4


def test_an_entry_whose_gradient_is_not_finite_stays():
    memory = small()
    write(memory, 0, [0.0, 1.0], [1, 2], [2.0, 8.0])
    rows, bad = torch.tensor([[0, 1]]), torch.tensor([[float("nan"), 1.0]])
    memory.descend(torch.tensor([0]), rows, (torch.zeros(1, 2, 1), bad), 0.1, 0.9, 0.01)
    assert held(memory, 0)[0.0] == 2.0
    assert held(memory, 0)[1.0] < 8.0
    assert bool(memory.state_dict()["tables"]["0"]["moments"].isfinite().all())


@pytest.mark.parametrize("search", ["torch", "scan"])
def test_the_search_finds_the_keys_where_gradients_moved_them(search):
    torch.manual_seed(4)
    memory = filled(search, k=11)
    start = memory.tables[0].keys[: memory.sizes[0]].clone()
    for turn in range(150):
        queries = torch.randn(16, 5) * 3
        descend(memory, queries, torch.randint(3, (16,)), torch.randn(16) * 5, rate=0.3)
        if turn % 3 == 0:
            memory.write(torch.randint(3, (8,)), torch.randn(8, 5) * 4, torch.randint(700, 1100, (8,)), torch.randn(8))
        reading = memory.estimate(queries)
        memory.touch(reading.rows)
        for action, table in enumerate(memory.tables):
            keys = table.keys[: table.size].double()
            squared = (queries.double()[:, None] - keys).square().sum(2)
            assert torch.equal(reading.rows[:, action], squared.sort(dim=1, stable=True).indices[:, :11])
    assert float((memory.tables[0].keys[: len(start)] - start).norm(dim=1).median()) > 0.5


@pytest.mark.parametrize("search", ["torch", "scan"])
def test_a_saved_copy_goes_on_alike(search):
    torch.manual_seed(5)
    memory = filled(search)
    descend(memory, torch.randn(16, 5), torch.arange(16) % 3, torch.randn(16))
    copy = small(num_actions=3, dims=5, capacity=400, k=7, search=search)
    copy.load_state_dict(memory.state_dict())
    for _ in range(30):
        queries, actions, goals = torch.randn(16, 5) * 3, torch.randint(3, (16,)), torch.randn(16)
        hashes = torch.randint(800, 1200, (16,))
        for each in (memory, copy):
            descend(each, queries, actions, goals)
            each.touch(each.estimate(queries).rows)
            each.write(actions, queries, hashes, goals)
    for action in range(3):
        mine, theirs = (each.state_dict()["tables"][str(action)] for each in (memory, copy))
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("knob", "bad"),
    [("k", 0), ("capacity", 1), ("delta", 0.0), ("delta", float("nan")), ("alpha", 0.0), ("alpha", 1.5), ("search", "annoy")],
)
def test_bad_knobs_are_named(knob, bad):
    with pytest.raises(UserError, match=knob) as mistake:
        small(**{knob: bad})
    assert "\n" not in str(mistake.value)
