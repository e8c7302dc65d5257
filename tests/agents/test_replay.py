"""The ring against a slow reference that keeps everything in lists and knows nothing of slots."""

import copy
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from agents.replay import Replay
from agents.stack import empty_stack, push_frame
from envs.api import Spec, Step, UserError, check_step

CPU = torch.device("cpu")
OBS = (1, 2, 3)
GAMMA = 0.9
SPEC = Spec("random", 5, ("a", "b", "c", "d", "e"), OBS, 1)


def replay(capacity: int, stack_frames: int = 3, n_steps: int = 1, whole: bool = False, obs_shape=OBS, gamma: float = GAMMA) -> Replay:
    return Replay(capacity, obs_shape, SPEC.num_actions, stack_frames, n_steps, gamma, whole, CPU)


def value(stacks: torch.Tensor) -> torch.Tensor:
    """Some value of stacks uint8 (M, K, C, H, W)."""
    return (stacks.flatten(1).double() * torch.arange(1, stacks[0].numel() + 1)).sum(1).float() / 1000


@dataclass
class Slot:
    """One frame of a lane's history; `action` is None where it is a successor."""

    stack: torch.Tensor
    frames_before: int
    action: int | None = None
    reward: float = 0.0
    discount: float = 1.0
    cut: bool = False
    whole: float | None = None


@dataclass
class Lane:
    """A lane's history as a list without end, and what a ring of `ring` slots would still hold of it."""

    ring: int
    n_steps: int
    stack_frames: int
    slots: list[Slot] = field(default_factory=list)
    unclosed: int = 0

    def live(self, obs, stack, action, reward, discount, last, next_obs, age) -> None:
        self.slots.append(Slot(stack, min(age, self.stack_frames - 1), action, reward, discount, last))
        if last:
            frames = torch.cat([stack[1:], next_obs[None]])
            self.slots.append(Slot(frames, min(age + 1, self.stack_frames - 1)))
        end = len(self.slots) - 1
        if last or end - self.unclosed >= self.ring // 2:
            filled = end if last else (self.unclosed + end) // 2
            total = float(value(self.slots[end].stack[None]))
            for t in range(end - 1, self.unclosed - 1, -1):
                total = self.slots[t].reward + GAMMA * self.slots[t].discount * total
                if t < filled:
                    self.slots[t].whole = total
            self.unclosed = end + 1 if last else filled

    def target(self, t: int):
        """(n-step reward, weight of the bootstrap, its slot) of step t, or None where they are not known yet."""
        reward, weight = 0.0, 1.0
        for steps in range(self.n_steps):
            if t + steps >= len(self.slots):
                return None
            slot = self.slots[t + steps]
            reward, weight = reward + weight * slot.reward, weight * GAMMA * slot.discount
            if slot.cut:
                return reward, weight, t + steps + 1
        return (reward, weight, t + self.n_steps) if t + self.n_steps < len(self.slots) else None

    def may_be_sampled(self, t: int, whole: bool) -> bool:
        slot = self.slots[t]
        held = t - slot.frames_before >= len(self.slots) - self.ring
        if slot.action is None or not held or self.target(t) is None:
            return False
        return slot.whole is not None if whole else True


class World:
    """Random lanes: terminations, time limits, lost lives, and a stretch of very long episodes."""

    def __init__(self, lanes: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.lanes = lanes
        self.step = Step(self.frames(), torch.zeros(lanes), torch.ones(lanes), torch.ones(lanes, dtype=torch.bool), torch.empty(0))

    def frames(self) -> torch.Tensor:
        return torch.randint(1, 256, (self.lanes, *OBS), generator=self.generator, dtype=torch.uint8)

    def chance(self, share: float) -> torch.Tensor:
        return torch.rand(self.lanes, generator=self.generator) < share

    def new_iteration(self) -> None:
        """What a reset shows: the last step was cut."""
        self.step = self.step._replace(last=torch.ones(self.lanes, dtype=torch.bool))

    def advance(self, ends: float, cut: bool) -> tuple[Step, torch.Tensor, Step]:
        before, obs = self.step, self.frames()
        action = torch.randint(SPEC.num_actions, (self.lanes,), generator=self.generator)
        reward = torch.randn(self.lanes, generator=self.generator)
        terminated, limit, life = self.chance(ends), self.chance(ends), self.chance(0.1)
        discount = (~(terminated | life)).float()
        last = terminated | limit
        if cut:
            last = torch.ones_like(last)
        next_obs = obs
        if last.any():
            next_obs = torch.where(last.view(-1, 1, 1, 1), self.frames(), obs)
        self.step = Step(obs, reward, discount, last, next_obs)
        check_step(self.step, SPEC)
        return before, action, self.step


def live(memory: Replay, lanes: list[Lane], world: World, ticks: int, ends: float, check=None) -> None:
    stack, ages = empty_stack(world.lanes, memory.stack_frames, OBS, CPU), [0] * world.lanes
    for tick in range(ticks):
        step, action, after = world.advance(ends, cut=tick == ticks - 1)
        frames, stack = push_frame(stack, step.obs, step.last)
        last = after.last if after.next_obs is not after.obs else None
        due = memory.append(step.obs, action, after.reward, after.discount, last, after.next_obs)
        if due is not None:
            memory.close(value(memory.stacks(due)))
        for number, lane in enumerate(lanes):
            ages[number] = 0 if step.last[number] else ages[number] + 1
            facts = (float(after.reward[number]), float(after.discount[number]), bool(after.last[number]))
            lane.live(step.obs[number], frames[number], int(action[number]), *facts, after.next_obs[number], ages[number])
        if check:
            check()


def contents(memory: Replay, lanes: list[Lane], whole: bool) -> None:
    """All that may be sampled, and nothing else, stands in the replay as in the lists."""
    found = {
        (lane, int(memory._ready[lane, place % memory.ring]))
        for lane in range(memory.lanes)
        for place in range(memory._first[lane], memory._past[lane])
    }
    wanted = {
        (number, t)
        for number, lane in enumerate(lanes)
        for t in range(max(0, len(lane.slots) - lane.ring), len(lane.slots))
        if lane.may_be_sampled(t, whole)
    }
    assert found == wanted
    assert len(memory) == len(wanted)
    if not wanted:
        return
    order = sorted(wanted)
    batch = memory._batch(np.array([lane for lane, _ in order]), np.array([t for _, t in order]))
    check_rows(batch, [(lanes[number], t) for number, t in order], whole)


def check_rows(batch, rows, whole: bool) -> None:
    targets = [lane.target(t) for lane, t in rows]
    assert torch.equal(batch.frames, torch.stack([lane.slots[t].stack for lane, t in rows]))
    assert batch.action.tolist() == [lane.slots[t].action for lane, t in rows]
    torch.testing.assert_close(batch.reward, torch.tensor([target[0] for target in targets]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batch.discount, torch.tensor([target[1] for target in targets]), rtol=1e-5, atol=1e-7)
    assert torch.equal(batch.next_frames, torch.stack([lane.slots[target[2]].stack for (lane, _), target in zip(rows, targets)]))
    if whole:
        torch.testing.assert_close(batch.whole_return, torch.tensor([lane.slots[t].whole for lane, t in rows]), rtol=1e-5, atol=1e-5)


def pair(lanes: int, ring: int, stack_frames: int, n_steps: int, whole: bool, seed: int = 0):
    lists = [Lane(ring, n_steps, stack_frames) for _ in range(lanes)]
    return replay(lanes * ring + lanes - 1, stack_frames, n_steps, whole), lists, World(lanes, seed)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("stack_frames", "n_steps"), [(1, 1), (4, 1), (1, 3), (3, 5)])
@pytest.mark.parametrize("ends", [0.0, 0.05, 0.9])
def test_equals_the_lists_at_every_step(whole, stack_frames, n_steps, ends):
    """Through three turns of the ring: all lanes cut, episodes of other lengths, and at the end one that is longer than the ring."""
    memory, lists, world = pair(3, 40, stack_frames, n_steps, whole, seed=n_steps)
    live(memory, lists, world, 70, ends, check=lambda: contents(memory, lists, whole))
    world.new_iteration()
    live(memory, lists, world, 50, 0.2, check=lambda: contents(memory, lists, whole))


@pytest.mark.parametrize("whole", [False, True])
def test_a_saved_copy_goes_on_alike(whole):
    memory, lists, world = pair(2, 40, 3, 3, whole)
    live(memory, lists, world, 60, 0.1)
    other = replay(2 * 40 + 1, 3, 3, whole)
    other.load_state_dict(copy.deepcopy(memory.state_dict()))
    contents(other, lists, whole)
    torch.manual_seed(4)
    expected = memory.sample(50)
    torch.manual_seed(4)
    assert all(torch.equal(left, right) for left, right in zip(expected, other.sample(50)))
    world.new_iteration()
    live(other, lists, world, 60, 0.1, check=lambda: contents(other, lists, whole))


def test_frames_kept_apart_from_the_learner_give_the_same_batches():
    memory, lists, world = pair(2, 40, 3, 3, whole=True)
    memory.memory_device = torch.device("cpu", 0)  # not equal to torch.device("cpu"): the way of a GPU whose memory is too small
    live(memory, lists, world, 60, 0.1, check=lambda: contents(memory, lists, True))


def test_samples_are_drawn_uniformly_from_all_that_is_ready():
    memory, lists, world = pair(3, 40, 1, 2, whole=False)
    live(memory, lists, world, 60, 0.1)
    drawn, count = memory.sample(60_000).frames[:, 0].flatten(1), len(memory)
    _, counts = drawn.unique(dim=0, return_counts=True)
    assert len(counts) == count
    share = counts.double() / counts.sum() * count
    assert float(share.std()) == pytest.approx((count / 60_000) ** 0.5, rel=0.3)  # binomial


def test_a_million_frames_fit_into_the_promised_memory():
    for whole in (False, True):
        memory = replay(1_000_000, 4, 1, whole, obs_shape=(1, 84, 84))
        assert memory.bytes_per_slot <= 7200
        assert memory.required_bytes(10**9) <= 7.2e9
        assert memory.required_bytes(0) == 0


@pytest.mark.parametrize("whole", [False, True])
def test_required_bytes_bounds_what_is_held(whole):
    memory, lists, world = pair(3, 40, 2, 2, whole)
    steps = 0

    def check():
        nonlocal steps
        steps += 3
        assert memory.nbytes <= memory.required_bytes(steps)

    live(memory, lists, world, 100, 0.9, check)
    arrays = [memory._frames, *memory._fields.values()]
    held = sum(array.nbytes for array in arrays) + memory._ages.nbytes + memory._spans.nbytes + memory._ready.nbytes
    assert held <= memory.required_bytes(steps)
    assert memory.nbytes == 3 * 40 * memory.bytes_per_slot


def test_memory_that_is_not_written_is_not_taken():
    import psutil

    process = psutil.Process()
    before = process.memory_info().rss
    memory = replay(1_000_000, 4, 1, True, obs_shape=(1, 84, 84))
    obs = torch.zeros(8, 1, 84, 84, dtype=torch.uint8)
    memory.append(obs, torch.zeros(8, dtype=torch.int64), torch.zeros(8), torch.ones(8), None, obs)
    assert memory._frames.shape[0] == 1_000_001
    assert process.memory_info().rss - before < 300e6


def test_a_ring_larger_than_memory_is_promised_and_one_beyond_addresses_refused():
    import psutil

    obs = torch.zeros(1, 1, 84, 84, dtype=torch.uint8)
    step = obs, torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.ones(1), None, obs
    memory = replay(4 * psutil.virtual_memory().total // 7100, 4, 1, False, obs_shape=(1, 84, 84))
    for _ in range(3):
        memory.append(*step)
    assert memory.sample(4).reward.tolist() == [1.0] * 4
    for capacity in (10**15, 10**30):
        with pytest.raises(UserError, match="more than this machine can address"):
            replay(capacity, 4, 1, False, obs_shape=(1, 84, 84)).append(*step)


def test_a_checkpoint_links_what_has_not_changed(tmp_path, monkeypatch):
    """What was written stays in its place, so of a memory that grew or turned only new chunks are written."""
    from lab import checkpoint, checkpoint_files

    monkeypatch.setattr(checkpoint_files, "CHUNK_BYTES", 256)
    memory, lists, world = pair(2, 4000, 3, 1, whole=False)
    live(memory, lists, world, 3000, 0.01)
    checkpoint.save(tmp_path, {"replay": memory.state_dict()})
    world.new_iteration()
    live(memory, lists, world, 300, 0.01)
    checkpoint.save(tmp_path, {"replay": memory.state_dict()})
    chunks = [path for path in (tmp_path / "checkpoint").iterdir() if len(path.stem) == 64]
    linked = sum(path.stat().st_nlink > 1 for path in chunks)
    assert linked > 0.85 * len(chunks)
    other = replay(2 * 4000 + 1, 3, 1)
    other.load_state_dict(checkpoint.load(tmp_path).state["replay"])
    assert len(other) == len(memory)


def test_state_is_views_not_copies():
    memory, lists, world = pair(2, 40, 3, 1, whole=True)
    live(memory, lists, world, 60, 0.1)
    for lane in memory.state_dict()["lanes"].values():
        storages = {memory._frames.untyped_storage().data_ptr()}
        assert lane["frames"].untyped_storage().data_ptr() in storages
        assert lane["frames"].is_contiguous()


@pytest.mark.parametrize(
    ("knob", "other"), [("stack_frames", 2), ("n_steps", 2), ("capacity", 99), ("whole", True), ("gamma", 0.5), ("obs_shape", (1, 3, 3))]
)
def test_a_state_of_another_shape_is_refused(knob, other):
    memory, lists, world = pair(2, 40, 3, 1, whole=False)
    live(memory, lists, world, 10, 0.1)
    knobs = {"capacity": 81, "stack_frames": 3, "n_steps": 1, "whole": False} | {knob: other}
    with pytest.raises(UserError, match="saved replay"):
        replay(**knobs).load_state_dict(memory.state_dict())


def test_misuse_is_told():
    memory, _, world = pair(2, 40, 3, 1, whole=True)
    step, action, after = world.advance(0.0, cut=True)
    assert memory.append(step.obs, action, after.reward, after.discount, after.last, after.next_obs) is not None
    with pytest.raises(AssertionError, match="close"):
        memory.append(step.obs, action, after.reward, after.discount, after.last, after.next_obs)
    memory.close(torch.zeros(2))
    with pytest.raises(AssertionError, match="close"):
        memory.close(torch.zeros(2))
    with pytest.raises(ValueError, match="2 lanes, 1 came"):
        memory.append(step.obs[:1], action[:1], after.reward[:1], after.discount[:1], None, after.obs[:1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("apart", [False, True])
def test_batches_on_a_gpu_equal_those_of_the_host(apart):
    knobs = (2 * 40 + 1, OBS, SPEC.num_actions, 3, 3, GAMMA, True)
    host, device = Replay(*knobs, CPU), Replay(*knobs, torch.device("cuda"))
    if apart:
        device.memory_device = CPU
    for memory in (host, device):
        world = World(2, seed=0)
        for tick in range(60):
            step, action, after = (part for part in world.advance(0.1, cut=tick == 59))
            last = after.last if after.next_obs is not after.obs else None
            tensors = [step.obs, action, after.reward, after.discount, last, after.next_obs]
            due = memory.append(*(None if tensor is None else tensor.to(memory.device) for tensor in tensors))
            if due is not None:
                memory.close(value(memory.stacks(due).cpu()).to(memory.device))
    torch.manual_seed(0)
    expected = host.sample(100)
    torch.manual_seed(0)
    for left, right in zip(expected, device.sample(100)):
        assert right.device.type == "cuda"
        torch.testing.assert_close(left, right.cpu(), rtol=1e-5, atol=1e-5)
