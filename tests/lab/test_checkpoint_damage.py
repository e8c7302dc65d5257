"""Damaged checkpoints are refused, and a stranger's do no harm."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_states import CHUNK, one_line, table

from envs.api import UserError
from lab import checkpoint_files, checkpoint_format
from lab.checkpoint import CURRENT, PREVIOUS, WRITING, NoCheckpoint, load, save


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "CHUNK_BYTES", CHUNK)


# Damage


def damages() -> list[tuple[str, Callable[[Path], Any]]]:
    def change(file: Path, text: Callable[[bytes], bytes]) -> None:
        old = file.read_bytes()
        file.unlink()  # never through a hard link
        file.write_bytes(text(old))

    def chunk(folder: Path) -> Path:
        return max((file for file in folder.iterdir() if len(file.name) > 60), key=lambda file: file.stat().st_size)

    def fifo(file: Path) -> None:
        file.unlink()
        os.mkfifo(file)

    def make_folder(file: Path) -> None:
        file.unlink()
        file.mkdir()

    def link(file: Path) -> None:
        file.rename(file.parent.parent / "elsewhere")
        file.symlink_to(file.parent.parent / "elsewhere")

    flip = lambda text: text[:-5] + bytes([text[-5] ^ 1]) + text[-4:]  # noqa: E731
    kinds: list[tuple[str, Callable[[Path], Any]]] = [("folder emptied", lambda f: (shutil.rmtree(f), f.mkdir()))]
    kinds += [("folder is a file", lambda f: (shutil.rmtree(f), f.write_text("x")))]
    kinds += [("not JSON", lambda f: change(f / "manifest.json", lambda _: b"\xff{{{"))]
    kinds += [("deep JSON", lambda f: change(f / "manifest.json", lambda _: b"[" * 200_000))]
    kinds += [("JSON list", lambda f: change(f / "manifest.json", lambda _: b"[]"))]
    files: dict[str, Callable[[Path], Path]] = {
        "chunk": chunk,
        "small": lambda folder: folder / "small.safetensors",
        "manifest": lambda folder: folder / "manifest.json",
    }
    for name, file in files.items():
        kinds += [(f"{name} flipped", lambda f, file=file: change(file(f), flip))]
        kinds += [(f"{name} header flipped", lambda f, file=file: change(file(f), lambda t: t[:11] + bytes([t[11] ^ 4]) + t[12:]))]
        kinds += [(f"{name} truncated", lambda f, file=file: change(file(f), lambda t: t[: len(t) // 2]))]
        kinds += [(f"{name} lengthened", lambda f, file=file: change(file(f), lambda t: t + b" "))]
        kinds += [(f"{name} empty", lambda f, file=file: change(file(f), lambda _: b""))]
        kinds += [(f"{name} missing", lambda f, file=file: file(f).unlink())]
        kinds += [(f"{name} is a pipe", lambda f, file=file: fifo(file(f)))]
        kinds += [(f"{name} is a folder", lambda f, file=file: make_folder(file(f)))]
        kinds += [(f"{name} is a link", lambda f, file=file: link(file(f)))]
    return kinds


DAMAGES = damages()
each_damage = pytest.mark.parametrize("damage", [damage for _, damage in DAMAGES], ids=[name for name, _ in DAMAGES])


@each_damage
def test_a_damaged_checkpoint_is_refused_and_the_previous_used(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    for n in (1, 2):
        save(tmp_path, {"t": table(9) * n, "s": torch.ones(3), "n": n})
    damage(tmp_path / CURRENT)
    found = load(tmp_path)
    assert found.state["n"] == 1
    assert found.name == PREVIOUS
    (warning,) = found.warnings
    assert "\n" not in warning
    assert "checkpoint was refused: " in warning
    assert "checkpoint.previous is used" in warning
    damage(tmp_path / PREVIOUS)
    with pytest.raises(UserError, match=r"checkpoint was refused: .*; checkpoint\.previous was refused: .*; put") as caught:
        load(tmp_path)
    assert not isinstance(caught.value, NoCheckpoint)
    one_line(caught.value)


@each_damage
def test_a_damaged_checkpoint_is_neither_kept_nor_linked_from(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    for n in (1, 2):
        save(tmp_path, {"t": table(9), "s": torch.ones(3), "n": n})
    damage(tmp_path / CURRENT)
    save(tmp_path, {"t": table(9), "s": torch.ones(3), "n": 3})
    assert load(tmp_path).state["n"] == 3
    shutil.rmtree(tmp_path / CURRENT)
    found = load(tmp_path)
    assert found.state["n"] == 1
    assert "checkpoint is missing (a save was interrupted)" in found.warnings[0]


def test_any_flipped_byte_is_noticed(tmp_path: Path) -> None:
    folder = save(tmp_path, {"t": torch.arange(CHUNK // 8), "s": torch.ones(3), "x": 1.5, "u": "a"})
    for file in folder.iterdir():
        text = bytearray(file.read_bytes())
        for position in range(0, len(text), 5 if len(text) < CHUNK else 97):
            text[position] ^= 0x10
            file.write_bytes(text)
            with pytest.raises(UserError, match="refused"):
                load(tmp_path)
            text[position] ^= 0x10
        file.write_bytes(text)
    load(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(NoCheckpoint) as caught:
            load(folder)
        assert str(folder) in one_line(caught.value)


# Strangers


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites the manifest with a right checksum of its own."""
    body = json.loads((folder / "manifest.json").read_text())
    del body["sha256"]
    change(body)
    rest = json.dumps(body).encode()[1:]
    (folder / "manifest.json").write_bytes(b'{"sha256": "' + hashlib.sha256(rest).hexdigest().encode() + b'", ' + rest)


def rename_file(name: str) -> Callable[[dict[str, Any]], Any]:
    def change(body: dict[str, Any]) -> None:
        body["files"][name] = body["files"].pop("small.safetensors")
        for row in (*body["headers"], *body["tensors"][1]["pieces"]):
            row[0] = name if row[0] == "small.safetensors" else row[0]

    return change


def claim(size: int) -> Callable[[dict[str, Any]], Any]:
    """A tensor, its piece and its file of `size` bytes."""

    def change(body: dict[str, Any]) -> None:
        entry = body["tensors"][0]
        entry["shape"] = [size // 4]
        entry["pieces"] = [[entry["pieces"][0][0], 0, size, "0" * 64]]
        body["files"][entry["pieces"][0][0]] = size

    return change


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "climbs out": (rename_file("../outside.safetensors"), "the file name"),
    "absolute": (rename_file("/etc/passwd"), "the file name"),
    "hidden climb": (rename_file("a" * 64 + ".safetensors/../../x"), "the file name"),
    "newline": (rename_file("small.safetensors\n"), "the file name"),
    "10^15 bytes": (claim(10**15), "instead of 1000000000000000"),
    "10^30 bytes": (claim(10**30), "is not a size"),
    "huge shape": (lambda body: body["tensors"][0].update(shape=[10**15]), "against the bytes"),
    "negative shape": (lambda body: body["tensors"][0].update(shape=[-9, -256]), "is not a size"),
    "true as size": (lambda body: body["tensors"][0].update(shape=[True, 9, 256]), "is not a size"),
    "other dtype": (lambda body: body["tensors"][0].update(dtype="float64"), "against the bytes"),
    "no dtype": (lambda body: body["tensors"][0].update(dtype="load"), "KeyError"),
    "piece outside": (lambda body: body["tensors"][0]["pieces"][0].__setitem__(1, 9999), "beyond the end"),
    "number as checksum": (lambda body: body["tensors"][0]["pieces"][0].__setitem__(3, 7), "is no text"),
    "newer": (lambda body: body.update(version=2), "format version 2, this Reverie reads 1"),
    "foreign": (lambda body: body.update(format="other"), "not that of a Reverie"),
    "no such tensor": (lambda body: body.update(state={"tensor": 7}), "IndexError"),
    "tensor at -1": (lambda body: body.update(state={"tensor": -1}), "is not a size"),
    "unknown leaf": (lambda body: body.update(state={"pickle": "cos\nsystem"}), "unknown kind 'pickle'"),
    "two kinds": (lambda body: body.update(state={"int": "1", "tuple": []}), "makes no sense"),
    "list as key": (lambda body: body.update(state={"dict": [[[], 1]]}), "TypeError"),
    "bad float": (lambda body: body.update(state={"float": "00"}), "makes no sense"),
    "no tree": (lambda body: body.pop("state"), "KeyError"),
    "files as list": (lambda body: body.update(files=[]), "AttributeError"),
}


@pytest.mark.parametrize("forgery", FORGERIES, ids=str)
def test_a_forged_manifest_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgery: str) -> None:
    change, reason = FORGERIES[forgery]
    save(tmp_path, {"n": 0})
    folder = save(tmp_path, {"t": table(9), "s": torch.ones(3)})
    shutil.copy(folder / "small.safetensors", tmp_path / "outside.safetensors")
    forge(folder, change)
    allocated = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **rest: allocated.append(size) or empty(size, **rest))
    found = load(tmp_path)
    assert found.name == PREVIOUS
    assert reason in found.warnings[0]
    assert sum(allocated) <= 9 * 256 + 3
    save(tmp_path, {"n": 1})
    assert load(tmp_path, only="n").name == CURRENT


def test_a_chunk_named_often_is_held_against_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(body: dict[str, Any]) -> None:
        body["tensors"] = body["tensors"] * 1000
        body["state"] = [{"tensor": index} for index in range(1000)]

    folder = save(tmp_path, {"t": torch.zeros(CHUNK // 4)})
    forge(folder, multiply)
    assert len(load(tmp_path).state) == 1000
    monkeypatch.setattr(checkpoint_files, "_free_memory", lambda: 500 * CHUNK)
    with pytest.raises(UserError, match="bytes of memory more than are free"):
        load(tmp_path)


def test_a_long_manifest_is_neither_written_nor_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {"n": "x" * 5000})
    monkeypatch.setattr(checkpoint_format, "MANIFEST_BYTES", 4000)
    monkeypatch.setattr(checkpoint_files, "MANIFEST_BYTES", 4000)
    with pytest.raises(UserError, match=r"manifest\.json has \d+ bytes, more than 4000"):
        load(tmp_path)
    with pytest.raises(TypeError, match="4000 are allowed"):
        save(tmp_path, {"n": "x" * 5000})
    assert not (tmp_path / WRITING).exists()
