"""Frame shards: what is written is read, in bounded shards; every way a folder can be wrong ends in one line that names it."""

import hashlib
import json

import pytest
import torch

from envs.api import UserError
from generative.api import Clip
from generative.data import FrameData, FrameMemory, FrameWriter, frame_weights, image_clip

SHAPE = (1, 4, 3)


def frames_of(count, shape=SHAPE):
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path):
    """25 frames in shards of 10, appended in uneven parts."""
    frames = frames_of(25)
    with FrameWriter(tmp_path / "frames", SHAPE, {"env": "Toy", "seed": 3}, shard_bytes=125) as writer:
        for part in frames.split([1, 7, 15, 2]):
            writer.append(part)
    torch.save(frames, tmp_path / "frames.pt")
    return tmp_path / "frames"


def frames_in(folder):
    return torch.load(folder.parent / "frames.pt")


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def refused(folder, match, **knobs):
    with pytest.raises(UserError, match=match) as caught:
        FrameData(folder, **knobs)
    assert "\n" not in str(caught.value)


def test_what_is_written_is_read(folder):
    frames, source = frames_in(folder), FrameData(folder, obs_shape=SHAPE)
    assert (len(source), source.obs_shape, source.source) == (25, SHAPE, {"env": "Toy", "seed": 3})
    assert torch.equal(source.batch(torch.arange(25)), frames)
    picked = torch.tensor([24, 0, 10, 9, 24])
    assert torch.equal(source.batch(picked), frames[picked])
    assert source.batch(torch.tensor([], dtype=torch.int64)).shape == (0, *SHAPE)


def test_shards_are_bounded_named_and_checksummed(folder):
    shards = manifest_of(folder)["shards"]
    assert [shard["frames"] for shard in shards] == [10, 10, 5]
    for shard in shards:
        content = (folder / shard["name"]).read_bytes()
        assert len(content) == 12 * shard["frames"]
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
    assert sorted(path.name for path in folder.iterdir()) == [*(shard["name"] for shard in shards), "manifest.json"]


@pytest.mark.parametrize("count", [10, 20, 1])
def test_whole_shards_leave_no_empty_one(tmp_path, count):
    with FrameWriter(tmp_path, SHAPE, {}, shard_bytes=120) as writer:
        writer.append(frames_of(count))
    assert len(FrameData(tmp_path)) == count
    assert all(shard["frames"] for shard in manifest_of(tmp_path)["shards"])


def test_sample_follows_the_default_generator_and_reaches_every_frame(folder):
    frames = frames_in(folder)
    for source in (FrameData(folder), FrameMemory.from_tensor(frames)):
        torch.manual_seed(5)
        first, second = source.sample(300), source.sample(300)
        torch.manual_seed(5)
        assert torch.equal(source.sample(300), first)
        assert not torch.equal(first, second)
        assert len(torch.unique(first.flatten(1), dim=0)) == 25


def test_split_holds_out_the_frames_recorded_last(folder):
    frames, (fitted, held) = frames_in(folder), FrameData(folder).split(0.2)
    assert (len(fitted), len(held), held.obs_shape) == (20, 5, SHAPE)
    for part, rows in ((fitted, frames[:20]), (held, frames[20:])):
        drawn = {frame.numpy().tobytes() for frame in part.sample(500)}
        assert drawn == {frame.numpy().tobytes() for frame in rows}
    assert torch.equal(held.spread(100), frames[20:])
    assert torch.equal(fitted.spread(3), frames[[0, 6, 13]])


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_split_that_leaves_nothing_is_refused(folder, share):
    with pytest.raises(UserError, match=rf"fit\.heldout={share} of 25 frames .* change fit\.heldout"):
        FrameData(folder).split(share)


def test_indices_beyond_are_refused(folder):
    for index in (-1, 25):
        with pytest.raises(IndexError, match=r"0\.\.24"):
            FrameData(folder).batch(torch.tensor([index]))


def test_a_folder_with_frames_is_refused_unless_told(folder):
    with pytest.raises(UserError, match="already holds frames"):
        FrameWriter(folder, SHAPE, {})
    assert len(FrameData(folder)) == 25
    fresh = frames_of(2)
    with FrameWriter(folder, SHAPE, {}, overwrite=True) as writer:
        writer.append(fresh)
        refused(folder, r"holds no manifest\.json")
    assert torch.equal(FrameData(folder).batch(torch.arange(2)), fresh)
    assert len(list(folder.iterdir())) == 2


def test_a_killed_writer_leaves_no_manifest_and_its_folder_can_be_used_again(tmp_path):
    FrameWriter(tmp_path, SHAPE, {}).append(frames_of(3))
    refused(tmp_path, "was killed")
    (tmp_path / "frames-00007.bin").write_bytes(b"left over")
    with FrameWriter(tmp_path, SHAPE, {}) as writer:
        writer.append(frames_of(4))
    assert len(FrameData(tmp_path)) == 4
    assert not (tmp_path / "frames-00007.bin").exists()


def test_an_interrupted_collection_keeps_its_frames(tmp_path):
    def collect():
        with FrameWriter(tmp_path, SHAPE, {}) as writer:
            writer.append(frames_of(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect()
    assert len(FrameData(tmp_path)) == 3


class FullDisk:
    """A file that takes `room` bytes and then fails as a full disk does."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, view):
        if self.room == 0:
            raise OSError(28, "No space left on device")
        written = self.file.write(view[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def test_a_full_disk_is_one_line_and_keeps_whole_appends(tmp_path):
    frames = frames_of(8)

    def collect():
        with FrameWriter(tmp_path, SHAPE, {}) as writer:
            writer.append(frames[:3])
            writer._file = FullDisk(writer._file, room=17)
            writer.append(frames[3:])

    with pytest.raises(UserError, match="No space left"):
        collect()
    assert torch.equal(FrameData(tmp_path).batch(torch.arange(3)), frames[:3])
    assert len(FrameData(tmp_path)) == 3


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write frames"):
        FrameWriter(tmp_path / "file" / "frames", SHAPE, {})


def test_other_shapes_are_refused_with_both(folder):
    refused(folder, r"\(1, 4, 3\).*\(1, 84, 84\)", obs_shape=(1, 84, 84))
    with pytest.raises(AssertionError):
        FrameWriter(folder, SHAPE, {}, overwrite=True).append(frames_of(1, (1, 3, 4)))


def test_missing_empty_and_foreign_folders_are_refused(tmp_path):
    refused(tmp_path / "nowhere", "no folder")
    refused(tmp_path, "holds no manifest.json")
    with FrameWriter(tmp_path / "empty", SHAPE, {}):
        pass
    refused(tmp_path / "empty", "holds no frames")
    for text, match in (("{", "cannot be read"), ("[]", "is not a manifest"), ('{"format": "others"}', "is not a manifest")):
        (tmp_path / "manifest.json").write_text(text)
        refused(tmp_path, match)


@pytest.mark.parametrize("harm", ["truncated", "longer", "tampered", "missing"])
def test_a_damaged_shard_is_refused_by_name(folder, harm):
    shard = folder / "frames-00001.bin"
    content = bytearray(shard.read_bytes())
    if harm == "missing":
        shard.unlink()
    else:
        content[5] ^= 1
        shard.write_bytes({"truncated": content[:-1], "longer": content + b"x", "tampered": content}[harm])
    refused(folder, r"frames-00001\.bin")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 2),
        ("obs_shape", [1, 4]),
        ("obs_shape", [1, 4, -3]),
        ("frames", 26),
        ("frames_per_shard", 9),
        ("frames_per_shard", "10"),
        ("shards", None),
        ("shards", [{"name": "../secret", "frames": 25, "sha256": ""}]),
        ("shards", [{"name": "frames-00000.bin", "frames": True, "sha256": ""}]),
        ("source", None),
    ],
)
def test_a_tampered_manifest_is_refused(folder, key, value):
    (folder / "manifest.json").write_text(json.dumps(manifest_of(folder) | {key: value}))
    refused(folder, "manifest.json is")


def test_unknown_keys_are_passed_over(folder):
    (folder / "manifest.json").write_text(json.dumps(manifest_of(folder) | {"actions": {"dtype": "int64"}}))
    assert len(FrameData(folder)) == 25


def test_memory_fills_up_to_its_capacity():
    frames, memory = frames_of(5), FrameMemory(SHAPE, capacity=5)
    memory.append(frames[:2])
    assert len(memory) == 2
    assert len(torch.unique(memory.sample(100).flatten(1), dim=0)) == 2
    memory.append(frames[2:])
    assert torch.equal(memory.batch(torch.arange(5)), frames)
    with pytest.raises(ValueError, match="capacity of 5"):
        memory.append(frames[:1])


def test_frame_weights_keep_the_successor_of_the_first_last():
    last = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1]]).bool()
    zeros = torch.zeros(4, 3)
    clip = Clip(frames_of(16).unflatten(0, (4, 4)), zeros.long(), zeros, zeros, last)
    assert frame_weights(clip).tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_an_image_clip_has_no_transitions():
    frames = frames_of(6)
    clip = image_clip(frames)
    assert torch.equal(clip.frames[:, 0], frames)
    assert [tuple(tensor.shape) for tensor in clip[1:]] == [(6, 0)] * 4
    assert [tensor.dtype for tensor in clip[1:]] == [torch.int64, torch.float32, torch.float32, torch.bool]
    assert frame_weights(clip).tolist() == [[1.0]] * 6
