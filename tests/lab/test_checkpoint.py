"""Checkpoints come back bit for bit, and unchanged chunks are linked."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_states import CHUNK, random_state, random_tensor, same, table
from safetensors.torch import load_file

from envs.api import UserError
from lab import checkpoint_files, checkpoint_format
from lab.checkpoint import CURRENT, PREVIOUS, WRITING, load, required_bytes, save


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "CHUNK_BYTES", CHUNK)


def inodes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_ino for file in folder.iterdir()}


# Round trips


@pytest.mark.parametrize("seed", range(40))
def test_random_states_come_back_bit_for_bit(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    states = [{"state": random_state(rng), "big": random_tensor(rng)} for _ in range(3)]
    for state in states:
        save(tmp_path, state)
        found = load(tmp_path)
        assert same(found.state, state)
        assert found.name == CURRENT
        assert found.warnings == ()


@pytest.mark.parametrize("dtype", list(checkpoint_format.DTYPES), ids=str)
def test_every_dtype_small_and_large(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2, (3 * CHUNK,), dtype=torch.uint8)
    large = raw.view(dtype)
    state = {"scalar": large[3].clone(), "empty": large[:0].reshape(0, 5), "small": large[:12].reshape(3, 4), "large": large}
    save(tmp_path, state)
    assert same(load(tmp_path).state, state)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.T,
        lambda t: t[::3],
        lambda t: t[:, 5:],
        lambda t: t[1].expand(50, 256),
        lambda t: t.reshape(2, -1, 16).permute(2, 0, 1),
        lambda t: torch.nn.Parameter(t),
        lambda t: t.flip(0),
        lambda t: torch.complex(t, t).conj(),
        lambda t: torch.complex(t, t).conj().imag,
    ],
)
def test_views_of_one_storage(tmp_path: Path, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    base = table(40)
    state = {"base": base, "view": view(base), "again": base}
    assert state["view"].nbytes > CHUNK
    save(tmp_path, state)
    found = load(tmp_path).state
    assert torch.equal(found["view"], state["view"])
    assert torch.equal(found["base"], base)
    assert torch.equal(found["again"], base)


@pytest.mark.parametrize("seed", range(30))
def test_flat_is_a_slice_of_the_flattened_tensor(seed: int) -> None:
    rng = random.Random(seed)
    tensor = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).permute(rng.sample(range(4), 4))[:, :: rng.choice([1, 2])]
    start, stop = sorted(rng.sample(range(tensor.numel() + 1), 2))
    assert torch.equal(checkpoint_files.flat(tensor, start, stop), tensor.reshape(-1)[start:stop])


def test_a_lone_number_with_torch_s_negation_bit(tmp_path: Path) -> None:
    imaginary = torch.tensor([1 + 2j]).conj().imag
    assert imaginary.is_neg()
    save(tmp_path, {"x": imaginary, "y": imaginary[0]})
    assert same(load(tmp_path).state, {"x": torch.tensor([-2.0]), "y": torch.tensor(-2.0)})


def test_subclasses_come_back_plain(tmp_path: Path) -> None:
    pair = namedtuple("pair", "a b")
    save(tmp_path, {"o": OrderedDict(b=1, a=2), "p": pair(1, 2.5), "f": torch.tensor(1.5, dtype=torch.float64).numpy()[()]})
    assert same(load(tmp_path).state, {"o": {"b": 1, "a": 2}, "p": (1, 2.5), "f": 1.5})


def test_an_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def run(stop_after: int | None) -> torch.Tensor:
        torch.manual_seed(3)
        net = torch.nn.Linear(4, 2)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        for update in range(6):
            if update == stop_after:
                save(tmp_path, {"net": net.state_dict(), "optimizer": optimizer.state_dict()})
                net, state = torch.nn.Linear(4, 2), load(tmp_path).state
                optimizer = torch.optim.Adam(net.parameters(), lr=0.7)
                net.load_state_dict(state["net"])
                optimizer.load_state_dict(state["optimizer"])
            optimizer.zero_grad()
            net(torch.full((3, 4), update + 1.0)).square().mean().backward()
            optimizer.step()
        return net.weight.detach()

    assert torch.equal(run(None), run(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_of_a_cuda_device_come_back_on_the_cpu(tmp_path: Path) -> None:
    state = {"large": table(40).cuda(), "view": table(40).cuda().T, "scalar": torch.tensor(3, device="cuda")}
    save(tmp_path, state)
    found = load(tmp_path).state
    for name, tensor in state.items():
        assert found[name].device.type == "cpu"
        assert torch.equal(found[name], tensor.cpu())


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ({"a": {"b": [1, object()]}}, "a/b/1"),
        ({"a": {"b": {2}}}, "a/b"),
        ({"a": b"bytes"}, "a"),
        ({"a": {1.5: 2}}, "a has the key 1.5"),
        ({"a": {True: 2}}, "a has the key True"),
        ({"a": torch.eye(2).to_sparse()}, "a is a torch.float32 tensor"),
        ({"x": {"m": torch.empty(2, device="meta")}}, "x/m"),
        ({"q": torch.empty(2, dtype=torch.bits8)}, "q is a torch.bits8"),
    ],
)
def test_a_leaf_that_cannot_be_stored_is_named(tmp_path: Path, state: dict[str, Any], path: str) -> None:
    save(tmp_path, {"fine": 1})
    with pytest.raises(TypeError, match=path):
        save(tmp_path, state)
    with pytest.raises(TypeError, match=path):
        required_bytes(state)
    assert load(tmp_path).state == {"fine": 1}


def test_a_state_inside_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["state"] = state
    with pytest.raises(TypeError, match="deeper than 100"):
        save(tmp_path, state)


# Files


def test_the_files_are_safetensors_and_json_named_by_checksum(tmp_path: Path) -> None:
    folder = save(tmp_path, {"a": table(10), "b": {"w": torch.arange(6).reshape(2, 3), "h": torch.ones(2, dtype=torch.bfloat16)}})
    names = {file.name for file in folder.iterdir()} - {"manifest.json", "small.safetensors"}
    assert len(names) == 3
    for name in names:
        chunk = load_file(folder / name)["chunk"]
        assert hashlib.sha256(chunk.numpy().tobytes()).hexdigest() + ".safetensors" == name
        assert chunk.numel() <= CHUNK
    small = load_file(folder / "small.safetensors")
    assert torch.equal(small["1:b/w"], torch.arange(6).reshape(2, 3))
    assert small["2:b/h"].dtype == torch.bfloat16
    assert json.loads((folder / "manifest.json").read_text())["format"] == "reverie-checkpoint"


def test_unchanged_chunks_are_linked(tmp_path: Path) -> None:
    save(tmp_path, {"t": table(40)})
    before = inodes(tmp_path / CURRENT)
    grown = torch.cat([table(40), table(8, value=0.5)])
    grown[0] = -1
    save(tmp_path, {"t": grown})
    after = inodes(tmp_path / CURRENT)
    kept = {name for name in after if after[name] == before.get(name)}
    assert len(kept) == 9  # of ten chunks all but the overwritten one
    assert len(after) == 2 + 12
    assert same(load(tmp_path).state, {"t": grown})
    assert inodes(tmp_path / PREVIOUS) == before


def test_equal_chunks_are_one_file_whatever_their_dtype(tmp_path: Path) -> None:
    state = {"f": torch.zeros(CHUNK), "i": torch.zeros(CHUNK, dtype=torch.int64)}
    assert len(list(save(tmp_path, state).iterdir())) == 3
    assert same(load(tmp_path).state, state)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV])
def test_without_links_chunks_are_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def no_link(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", no_link)
    for value in (0, 1):
        save(tmp_path, {"t": table(40), "n": value})
    assert same(load(tmp_path).state, {"t": table(40), "n": 1})
    assert not set(inodes(tmp_path / CURRENT).values()) & set(inodes(tmp_path / PREVIOUS).values())


def test_the_manifest_comes_last_and_all_is_on_disk_before_the_names_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {"n": 0})
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        events.append(("sync", path.name))
        if path.name == "manifest.json":
            assert path.read_bytes().endswith(b"}")
        fsync(handle)

    def noted_rename(path: Path, target: Path) -> Path:
        events.append(("rename", path.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    folder = save(tmp_path, {"t": table(40), "n": 1})
    parts = {file.name for file in folder.iterdir()} - {"manifest.json"}
    assert len(parts) == 11
    assert set(events[:11]) == {("sync", name) for name in parts}
    run = tmp_path.name
    assert events[11:] == [
        *(("sync", "manifest.json"), ("sync", WRITING)),
        *(("rename", CURRENT), ("sync", run), ("rename", WRITING), ("sync", run)),
    ]


def test_what_a_kill_left_is_cleaned_up(tmp_path: Path) -> None:
    (tmp_path / WRITING / "deep").mkdir(parents=True)
    (tmp_path / WRITING / "small.safetensors").write_bytes(b"half")
    save(tmp_path, {"n": 1})
    assert [entry.name for entry in tmp_path.iterdir()] == [CURRENT]


def test_only_two_checkpoints_stay(tmp_path: Path) -> None:
    for n in range(4):
        save(tmp_path, {"n": n})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [CURRENT, PREVIOUS]
    assert load(tmp_path).state == {"n": 3}
    shutil.rmtree(tmp_path / CURRENT)
    assert load(tmp_path).state == {"n": 2}


# A part alone


def test_only_a_part_is_read(tmp_path: Path) -> None:
    state = {
        "agent": {"encoder": {"w": table(20), "b": torch.ones(3)}, "x": [1, {"y": torch.ones(2)}], "table": table(40)},
        "a/b": {"c/d": 5},
    }
    folder = save(tmp_path, state)
    keep = {piece[0] for entry in json.loads((folder / "manifest.json").read_text())["tensors"][:2] for piece in entry["pieces"]}
    lost = [file for file in folder.iterdir() if file.name not in keep | {"manifest.json"}]
    assert len(lost) == 5  # the table's chunks that the encoder does not share
    for file in lost:
        file.unlink()
    assert same(load(tmp_path, only="agent/encoder").state, state["agent"]["encoder"])
    assert same(load(tmp_path, only="agent/x/1").state, {"y": torch.ones(2)})
    assert load(tmp_path, only="a/b/c/d").state == 5
    with pytest.raises(UserError, match=r"holds no 'agent/nothing', only agent, a/b"):
        load(tmp_path, only="agent/nothing")
    with pytest.raises(UserError, match="is missing"):
        load(tmp_path)
