import pytest
import torch

from agents.neighbours import Neighbours
from envs.api import UserError

CPU = torch.device("cpu")


def write(memory: Neighbours, action: int, keys: list[float], hashes: list[int], values: list[float]) -> None:
    memory.write(torch.full((len(keys),), action), torch.tensor(keys).view(-1, 1), torch.tensor(hashes), torch.tensor(values))


def ask(memory: Neighbours, key: float, frame: int):
    return memory.estimate(torch.tensor([[key]]), torch.tensor([frame]))


def small(**knobs) -> Neighbours:
    return Neighbours(**{"num_actions": 2, "dims": 1, "capacity": 4, "k": 2, "device": CPU, "search": "torch"} | knobs)


def test_estimate_is_the_plain_mean_of_the_nearest_and_the_exact_value_where_known():
    memory = small()
    write(memory, 0, [0.0, 1.0, 10.0], [100, 101, 110], [1.0, 3.0, 50.0])
    near = ask(memory, 0.4, 999)
    assert near.value[0, 0] == 2.0
    assert not near.exact[0, 0]
    assert sorted(near.rows[0, 0].tolist()) == [0, 1]
    exact = ask(memory, 123.0, 110)
    assert exact.value[0, 0] == 50.0
    assert exact.exact[0, 0]
    assert exact.rows[0, 0].tolist() == [2, -1]


def test_action_with_fewer_than_k_entries_is_worth_more_than_anything():
    memory = small()
    write(memory, 0, [0.0, 1.0], [100, 101], [1e30, 1e30])
    write(memory, 1, [0.0], [100], [0.0])
    estimate = ask(memory, 0.0, 100)
    assert estimate.value[0, 0] == pytest.approx(1e30)
    assert estimate.value[0, 1] == torch.inf
    assert estimate.rows[0, 1].tolist() == [-1, -1]


def test_values_only_rise():
    memory = small()
    for value, expected in ((5.0, 5.0), (3.0, 5.0), (8.0, 8.0)):
        write(memory, 0, [0.0, 1.0], [100, 101], [value, 0.0])
        assert ask(memory, 9.0, 100).value[0, 0] == expected
    assert memory.sizes == [2, 0]


def test_a_pair_seen_twice_in_one_episode_is_one_entry_with_the_larger_return():
    memory = small()
    write(memory, 0, [0.0, 1.0, 0.0], [100, 101, 100], [7.0, 2.0, 4.0])
    assert memory.sizes == [2, 0]
    assert ask(memory, 5.0, 100).value[0, 0] == 7.0


def test_full_table_gives_up_what_was_used_longest_ago():
    memory = small()
    for frame in range(4):
        write(memory, 0, [float(frame)], [100 + frame], [float(frame)])
    memory.touch(ask(memory, -5.0, 100).rows)  # an exact match uses frame 0
    memory.touch(ask(memory, 2.6, 999).rows)  # frames 2 and 3 are neighbours
    write(memory, 0, [9.0], [109], [9.0])  # frame 1 has to go
    assert memory.sizes[0] == 4
    known = {frame: bool(ask(memory, 0.0, 100 + frame).exact[0, 0]) for frame in (0, 1, 2, 3, 9)}
    assert known == {0: True, 1: False, 2: True, 3: True, 9: True}
    assert sorted(ask(memory, 9.1, 999).rows[0, 0].tolist()) == [1, 3]


def test_an_entry_that_is_written_again_is_used():
    memory = small(capacity=3)
    for frame in range(3):
        write(memory, 0, [float(frame)], [100 + frame], [float(frame)])
    write(memory, 0, [0.0], [100], [-1.0])
    write(memory, 0, [9.0], [109], [9.0])
    assert [bool(ask(memory, 0.0, frame).exact[0, 0]) for frame in (100, 101, 102, 109)] == [True, False, True, True]


def test_evicted_row_answers_for_its_new_key_only():
    memory = small(capacity=2)
    write(memory, 0, [0.0, 1.0], [100, 101], [1.0, 1.0])
    write(memory, 0, [50.0, 51.0], [150, 151], [7.0, 9.0])
    assert ask(memory, 0.0, 999).value[0, 0] == 8.0
    assert not ask(memory, 0.0, 100).exact[0, 0]


def test_episode_longer_than_the_table_keeps_its_end():
    memory = small(capacity=3)
    write(memory, 0, [float(t) for t in range(10)], list(range(100, 110)), [float(t) for t in range(10)])
    assert memory.sizes[0] == 3
    assert [bool(ask(memory, 0.0, 100 + t).exact[0, 0]) for t in (6, 7, 8, 9)] == [False, True, True, True]


def test_estimating_changes_nothing():
    memory = small()
    write(memory, 0, [0.0, 1.0, 2.0], [100, 101, 102], [1.0, 2.0, 3.0])
    before = {name: tensor.clone() for name, tensor in memory.state_dict()["tables"]["0"].items()}
    ask(memory, 0.3, 100)
    ask(memory, 0.3, 999)
    after = memory.state_dict()["tables"]["0"]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("search", ["torch", "scan"])
def test_grown_memory_equals_brute_force_and_its_saved_copy(search):
    torch.manual_seed(0)
    memory = Neighbours(3, 8, 3000, 5, CPU, search)
    for _ in range(30):
        actions, keys = torch.randint(3, (300,)), torch.randn(300, 8) * 3 + 100
        memory.write(actions, keys, torch.randint(2**62, (300,)), torch.randn(300))
    assert memory.sizes == [size for size in memory.sizes if 2800 < size <= 3000]
    queries, frames = torch.randn(16, 8) * 3 + 100, torch.randint(2**62, (16,))
    estimate = memory.estimate(queries, frames)
    for action in range(3):
        table = memory.state_dict()["tables"][str(action)]
        nearest = torch.cdist(queries.double(), table["keys"].double()).topk(5, largest=False).indices
        torch.testing.assert_close(estimate.value[:, action], table["values"][nearest].mean(1))
    copy = Neighbours(3, 8, 3000, 5, CPU, search)
    copy.load_state_dict(memory.state_dict())
    again = copy.estimate(queries, frames)
    assert torch.equal(again.value, estimate.value)
    assert torch.equal(again.rows, estimate.rows)
    more = (torch.randint(3, (900,)), torch.randn(900, 8), torch.randint(2**62, (900,)), torch.randn(900))
    for each in (memory, copy):
        each.write(*more)
    assert torch.equal(copy.estimate(queries, frames).rows, memory.estimate(queries, frames).rows)


def test_an_entry_costs_no_more_than_is_announced_and_at_most_450_bytes():
    memory = Neighbours(1, 64, 100_000, 11, CPU, "scan")
    memory.write(torch.zeros(100_000, dtype=torch.int64), torch.randn(100_000, 64), torch.arange(100_000), torch.zeros(100_000))
    assert 100_000 * (4 * 64 + 4 + 8 + 8) < memory.nbytes <= 450 * 100_000
    assert memory.nbytes <= memory.required_bytes(100_000)
    assert Neighbours(6, 64, 1_000_000, 11, CPU, "scan").required_bytes(6_000_000) <= 450 * 6_000_000


@pytest.mark.parametrize("skew", ["even", "one action"])
def test_announced_bytes_hold_at_every_size_and_however_the_entries_spread(skew):
    memory, entries = Neighbours(18, 64, 30_000, 11, CPU, "scan"), 0
    for _ in range(40):
        actions = torch.randint(18, (500,)) if skew == "even" else torch.zeros(500, dtype=torch.int64)
        memory.write(actions, torch.randn(500, 64), torch.randint(2**62, (500,)), torch.zeros(500))
        entries += 500
        held = [column.nbytes for table in memory.tables for column in table.columns().values()]
        assert sum(held) < memory.nbytes <= memory.required_bytes(entries)


@pytest.mark.parametrize(("knobs", "word"), [({"k": 0}, "k must"), ({"capacity": 1}, "capacity"), ({"search": "annoy"}, "annoy")])
def test_bad_knobs_are_named(knobs, word):
    with pytest.raises(UserError, match=word):
        small(**knobs)


def test_a_memory_of_other_shape_is_refused():
    with pytest.raises(UserError, match="actions"):
        small(num_actions=3).load_state_dict(small().state_dict())
