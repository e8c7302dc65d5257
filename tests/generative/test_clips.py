"""Clips on disk: what was played is read, whatever the blocks."""

import pytest
import torch
from recorded import ACTIONS, LANES, PARTS, SHAPE, SOURCE, SPEC, record, refused, steps_of

from envs.api import Spec, Step, UserError
from generative.clips import ClipData
from generative.recording import ClipWriter


@pytest.fixture
def folder(tmp_path):
    """Two parts, 41 and 20 steps of three lanes, with some ends of episodes in each lane."""
    return record(tmp_path / "clips", *PARTS)


def rows_by_hand(steps, widths=(1, 4, 20)):
    """Every (lane, start) of a part with its pictures, actions, rewards, discounts and last, as a slow loop says."""
    parts = {}
    for width in widths:
        for start in range(len(steps) - width + 1):
            for lane in range(LANES):
                frames, rest, alive = [steps[start][0].obs[lane]], [], True
                for t in range(start, start + width):
                    _, action, after = steps[t]
                    cut = bool(after.last[lane]) or t == len(steps) - 1
                    if alive:
                        frames.append(after.next_obs[lane])
                        rest.append((int(action[lane]), float(after.reward[lane]), float(after.discount[lane]), cut))
                    else:
                        frames.append(frames[-1])
                        rest.append((0, 0.0, 0.0, False))
                    alive = alive and not cut
                parts[width, start, lane] = torch.stack(frames), rest
    return parts


@pytest.mark.parametrize("width", [1, 4, 20])
def test_every_clip_is_what_was_played(folder, width):
    data, index = ClipData(folder, obs_shape=SHAPE), 0
    assert (data.obs_shape, data.num_actions, data.frames_per_step, data.lanes, data.source) == (SHAPE, ACTIONS, 4, LANES, SOURCE)
    assert data.starts(width) == LANES * (41 + 20 - 2 * width + 2)
    clips = data.clips(torch.arange(data.starts(width)), width)
    for steps in PARTS:
        by_hand = rows_by_hand(steps)
        for start in range(len(steps) - width + 1):
            for lane in range(LANES):
                frames, rest = by_hand[width, start, lane]
                assert torch.equal(clips.frames[index], frames), (width, start, lane)
                found = [tensor[index].tolist() for tensor in clips[1:]]
                torch.testing.assert_close(list(zip(*found)), rest, rtol=0, atol=1e-7)
                index += 1
    assert index == data.starts(width)
    assert [tensor.dtype for tensor in clips] == [torch.uint8, torch.int64, torch.float32, torch.float32, torch.bool]


@pytest.mark.parametrize(("lead", "ahead"), [(0, 3), (3, 1), (5, 4)])
def test_what_leads_to_a_step_stands_still_before_its_episode(folder, lead, ahead):
    """Rows enumerate the steps with `ahead` transitions to come; their first `lead` transitions go back as far as the episode had begun."""
    data, index = ClipData(folder), 0
    clips = data.clips(torch.arange(data.starts(lead + ahead, lead)), lead + ahead, lead)
    for steps in PARTS:
        rest = rows_by_hand(steps, (ahead,))
        for start in range(len(steps) - ahead + 1):
            for lane in range(LANES):
                frames, told = list(rest[ahead, start, lane][0]), list(rest[ahead, start, lane][1])
                for t in range(start - 1, start - 1 - lead, -1):
                    begun = t >= 0 and not any(bool(steps[u][2].last[lane]) for u in range(t, start))
                    frames.insert(0, steps[t][0].obs[lane] if begun else frames[0])
                    _, action, after = steps[t]
                    lived = int(action[lane]), float(after.reward[lane]), float(after.discount[lane]), False
                    told.insert(0, lived if begun else STILL)
                assert torch.equal(clips.frames[index], torch.stack(frames)), (start, lane)
                torch.testing.assert_close(list(zip(*(tensor[index].tolist() for tensor in clips[1:]))), told, rtol=0, atol=1e-7)
                index += 1
    assert index == data.starts(lead + ahead, lead)
    at = data.clips_at(1, 7, lead + ahead, lead)
    assert torch.equal(at.frames, clips.frames[LANES * (41 - ahead + 1) + 7 * LANES :][:LANES])


STILL = (-1, 0.0, 1.0, False)


def test_frames_are_the_observations_in_the_order_of_play(folder):
    data, frames = ClipData(folder), torch.cat([step.obs for steps in PARTS for step, _, _ in steps])
    assert len(data) == LANES * 61
    assert torch.equal(data.batch(torch.arange(len(data))), frames)
    picked = torch.tensor([182, 0, 123, 122, 182])
    assert torch.equal(data.batch(picked), frames[picked])
    assert data.batch(torch.tensor([], dtype=torch.int64)).shape == (0, *SHAPE)
    assert torch.equal(data.spread(3), frames[[0, 61, 122]])
    assert len(data.spread(10_000)) == len(data)


def test_draws_follow_the_default_generator_and_reach_everything(folder):
    data = ClipData(folder)
    torch.manual_seed(5)
    first, second, clips = data.sample(50), data.sample(50), data.sample_clips(5, 4)
    torch.manual_seed(5)
    assert torch.equal(data.sample(50), first)
    assert not torch.equal(first, second)
    data.sample(50)
    assert all(torch.equal(*pair) for pair in zip(data.sample_clips(5, 4), clips))
    assert len(torch.unique(data.sample(3000).flatten(1), dim=0)) == len(data)
    assert len(torch.unique(data.sample_clips(3000, 20).frames[:, 0].flatten(1), dim=0)) == data.starts(20)


def test_split_holds_out_what_was_recorded_last(folder):
    data = ClipData(folder)
    for share, steps in ((0.2, 12), (0.5, 30)):
        fitted, held = data.split(share)
        assert (len(fitted), len(held)) == (LANES * (61 - steps), LANES * steps)
        everything = torch.cat((fitted.batch(torch.arange(len(fitted))), held.batch(torch.arange(len(held)))))
        assert torch.equal(everything, data.batch(torch.arange(len(data))))
        whole = {row.numpy().tobytes() for row in data.clips(torch.arange(data.starts(4)), 4).frames}
        sides = [{row.numpy().tobytes() for row in side.clips(torch.arange(side.starts(4)), 4).frames} for side in (fitted, held)]
        assert sides[0] < whole
        assert sides[1] < whole
        assert not sides[0] & sides[1]
    assert torch.equal(held.spread_clips(10**6, 4).frames, held.clips(torch.arange(held.starts(4)), 4).frames)
    for share in (0.001, 0.999):
        with pytest.raises(UserError, match=rf"fit\.heldout={share} of 183 frames .* change fit\.heldout"):
            data.split(share)


def test_what_is_not_there_is_refused(folder):
    data = ClipData(folder)
    for index in (-1, 183):
        with pytest.raises(IndexError, match=r"0\.\.182"):
            data.batch(torch.tensor([index]))
    with pytest.raises(IndexError, match=r"0\.\.53"):
        data.clips(torch.tensor([54]), 24)
    with pytest.raises(UserError, match="no clip of 42 steps: its parts have 41"):
        data.sample_clips(2, 42)


def test_one_lane_of_grey_and_a_part_of_one_step(tmp_path):
    spec = Spec("Grey", 2, ("a", "b"), (1, 3, 2), 1)
    step, _, after = PARTS[0][0]
    step, after = (Step(*(x[:1, :1, :3, :2] if x.dtype == torch.uint8 else x[:1] for x in one)) for one in (step, after))
    with ClipWriter(tmp_path, spec, 1, {}) as writer:
        writer.append(step, torch.tensor([1]), after)
        writer.end_part({"episodes": 0})
    data = ClipData(tmp_path)
    clip = data.sample_clips(2, 1)
    assert torch.equal(clip.frames, torch.stack((step.obs[0], after.next_obs[0]))[None].expand(2, -1, -1, -1, -1))
    assert clip.actions.tolist() == [[1], [1]]
    assert data.parts[0]["episodes"] == 0


def test_collection_goes_on_to_the_same_bytes(folder, tmp_path):
    half = record(tmp_path / "half", PARTS[0])
    assert (half / "manifest.json").read_bytes() != (folder / "manifest.json").read_bytes()
    record(half, PARTS[1])
    for path in folder.iterdir():
        assert (half / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list(half.iterdir())) == len(list(folder.iterdir())) == 5


def test_a_kill_loses_the_part_that_was_open(tmp_path):
    writer = ClipWriter(tmp_path, SPEC, LANES, SOURCE)
    for step in PARTS[0]:
        writer.append(*step)
    refused(tmp_path, r"holds no manifest\.json")
    writer.end_part()
    for step in PARTS[1]:
        writer.append(*step)
    assert len(ClipData(tmp_path)) == LANES * 41
    assert (tmp_path / "clips-00001.zst").exists()  # as a kill would leave it
    with ClipWriter(tmp_path, SPEC, LANES, SOURCE) as other:
        assert len(other.parts) == 1
        assert not (tmp_path / "clips-00001.zst").exists()


def test_an_interrupted_part_is_removed(tmp_path):
    def collect():
        with ClipWriter(tmp_path, SPEC, LANES, SOURCE) as writer:
            for steps in PARTS:
                for step in steps:
                    writer.append(*step)
                if steps is PARTS[0]:
                    writer.end_part()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips-00000.safetensors", "clips-00000.zst", "manifest.json"]
    assert len(ClipData(tmp_path)) == LANES * 41


@pytest.mark.parametrize(("room", "where"), [(100, "append"), (1500, "end")])
def test_a_full_disk_is_one_line_and_keeps_whole_parts(folder, room, where):
    class FullDisk:
        def __init__(self, file):
            self.file, self.room = file, room

        def write(self, view):
            if self.room == 0:
                raise OSError(28, "No space left on device")
            written = self.file.write(view[: self.room])
            self.room -= written
            return written

        def __getattr__(self, name):
            return getattr(self.file, name)

    with ClipWriter(folder, SPEC, LANES, SOURCE) as writer:
        steps = steps_of(200 if where == "append" else 17, seed=3)
        writer.append(*steps[0])
        writer._part._file = FullDisk(writer._part._file)

        def go_on():
            for step in steps[1:]:
                writer.append(*step)
            assert where == "end"
            writer.end_part()

        with pytest.raises(UserError, match=r"cannot write clips to .*No space left"):
            go_on()
    assert len(ClipData(folder)) == LANES * 61
    assert len(list(folder.iterdir())) == 5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"source": {"env": "Toy", "seed": 4}}, "seed was 3 and is 4 now"),
        ({"source": {"env": "Toy"}}, "seed was 3 and is null now"),
        ({"num_envs": 2}, "lanes was 3 and is 2 now"),
        ({"spec": Spec("Toy", 5, tuple("abcde"), SHAPE, 4)}, "num_actions was 6 and is 5 now"),
        ({"spec": Spec("Toy", 6, tuple("abcdef"), (1, 5, 4), 4)}, r"obs_shape was \[3, 5, 4\] and is \[1, 5, 4\]"),
    ],
)
def test_a_folder_recorded_otherwise_is_refused_unless_told(folder, change, match):
    knobs = {"spec": SPEC, "num_envs": LANES, "source": SOURCE} | change
    with pytest.raises(UserError, match=match):
        ClipWriter(folder, **knobs)
    assert len(ClipData(folder)) == LANES * 61
    ClipWriter(folder, **knobs, overwrite=True).close()
    assert list(folder.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write clips"):
        ClipWriter(tmp_path / "file" / "clips", SPEC, LANES, SOURCE)
