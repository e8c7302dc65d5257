"""Full and read-only disks, and kills at any moment, lose nothing that was saved."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_states import CHUNK, one_line, random_state, same, table

from envs.api import UserError
from lab import checkpoint, checkpoint_files
from lab.checkpoint import CURRENT, PREVIOUS, WRITING, load, required_bytes, save


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "CHUNK_BYTES", CHUNK)


# Disk


@pytest.mark.parametrize("seed", range(10))
def test_required_bytes_are_enough_and_not_far_off(tmp_path: Path, seed: int) -> None:
    state = {"random": random_state(random.Random(seed)), "t": table(100), "s": torch.ones(10)}
    folder = save(tmp_path, state)
    on_disk = sum(-(-file.stat().st_size // 4096) * 4096 for file in folder.iterdir()) + 4096
    assert on_disk <= required_bytes(state) <= 4 * on_disk + 40_000


def test_required_bytes_of_a_large_state_are_close() -> None:
    state = {"t": torch.empty(1 << 28, dtype=torch.uint8).as_strided((1 << 31,), (0,))}
    checkpoint_files.CHUNK_BYTES = 64 << 20
    assert 1 <= required_bytes(state) / 2**31 < 1.001


def test_too_little_disk_is_said_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {"t": table(40), "n": 1})
    before = {file: file.read_bytes() for file in (tmp_path / CURRENT).iterdir()}
    monkeypatch.setattr(checkpoint, "_free_bytes", lambda folder: 30_000)
    changed = {"t": table(40, value=0.5), "n": 2}
    with pytest.raises(UserError, match=rf"it needs {required_bytes(changed)} bytes and 30000 are free") as caught:
        save(tmp_path, changed)
    one_line(caught.value)
    assert {file: file.read_bytes() for file in (tmp_path / CURRENT).iterdir()} == before
    assert not (tmp_path / WRITING).exists()


def test_linked_and_repeated_chunks_need_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grown = {"t": torch.cat([table(4000), table(4, value=0.5)])}
    zeros = {"t": torch.zeros(4000, 256)}
    for state, first in ((grown, {"t": table(4000)}), (zeros, {})):
        save(tmp_path, first)
        monkeypatch.setattr(checkpoint, "_free_bytes", lambda folder, state=state: required_bytes(state) - 900 * CHUNK)
        save(tmp_path, state)
        assert same(load(tmp_path).state, state)
        monkeypatch.undo()
        monkeypatch.setattr(checkpoint_files, "CHUNK_BYTES", CHUNK)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "mkdir", "rename"])
def test_a_failing_disk_leaves_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str) -> None:
    for n in (0, 1):
        save(tmp_path, {"t": table(40), "n": n})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        target = {"write": (checkpoint_files, "write_file"), "fsync": (os, "fsync"), "mkdir": (Path, "mkdir"), "rename": (Path, "rename")}
        patch.setattr(*target[call], fail)
        with pytest.raises(UserError) as caught:
            save(tmp_path, {"t": table(40, value=0.5), "n": 2})
    message = one_line(caught.value)
    assert str(tmp_path) in message
    expected = "it needs" if number in (errno.ENOSPC, errno.EDQUOT) else os.strerror(number)
    assert expected in message
    assert not (tmp_path / WRITING).exists()
    assert same(load(tmp_path).state, {"t": table(40), "n": 1})
    save(tmp_path, {"n": 3})
    assert load(tmp_path).state == {"n": 3}


def test_an_interrupt_leaves_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {"n": 1})

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_files, "manifest_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, {"n": 2})
    assert [entry.name for entry in tmp_path.iterdir()] == [CURRENT]
    assert load(tmp_path).state == {"n": 1}


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("warned", [True, False], ids=["by the check before", "by the disk itself"])
def test_a_full_disk(tiny_disk: Path, monkeypatch: pytest.MonkeyPatch, warned: bool) -> None:
    run = tiny_disk / "run"
    save(run, {"t": table(60), "n": 1})
    if not warned:
        free = [10**9]  # what the check is told; the message tells the truth
        real = checkpoint._free_bytes
        monkeypatch.setattr(checkpoint, "_free_bytes", lambda folder: free.pop() if free else real(folder))
    with pytest.raises(UserError, match=r"no room .* it needs \d+ bytes and (\d+) are free") as caught:
        save(run, {"t": table(250, value=0.5), "n": 2})
    one_line(caught.value)
    assert not (run / WRITING).exists()
    assert same(load(run).state, {"t": table(60), "n": 1})
    save(run, {"t": table(61), "n": 3})
    assert load(run, only="n").state == 3


def test_a_read_only_disk(tiny_disk: Path) -> None:
    save(tiny_disk, {"n": 1})
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    for folder in (tiny_disk, tiny_disk / "new"):
        with pytest.raises(UserError, match="Read-only file system; what was saved before is kept") as caught:
            save(folder, {"n": 2})
        one_line(caught.value)
    assert load(tiny_disk).state == {"n": 1}


# Kills. Both tests run in a fresh process that forks, since forking a process with a thread pool of torch may hang.


def in_fresh_process(function: Callable[..., Any], *arguments: str) -> str:
    here = Path(__file__)
    code = f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem} as t; t.{function.__name__}(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=here.parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def state_after(step: int) -> dict[str, Any]:
    """A table that grows with `step`, has one row overwritten, and agrees with the number beside it."""
    rows = table(8 + step)
    rows[step % 8] = -step
    return {"step": step, "table": rows, "small": torch.full((7,), step)}


def kill_at_random(run: str) -> None:
    """Prints how many saves had returned in all."""
    checkpoint_files.CHUNK_BYTES = CHUNK
    folder, rng = Path(run), random.Random(1)
    save(folder, state_after(0))
    for _ in range(30):
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            step = load(folder).state["step"]
            while True:
                step += 1
                save(folder, state_after(step))
                os.write(send, step.to_bytes(8, "little"))
        os.close(send)
        returned = os.read(receive, 8)  # on a busy machine, too, each child gets somewhere
        time.sleep(rng.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while part := os.read(receive, 1 << 16):
            returned += part
        os.close(receive)
        last_returned = int.from_bytes(returned[-8:], "little")
        found = load(folder).state
        assert last_returned <= found["step"] <= last_returned + 1, (last_returned, found["step"])
        assert same(found, state_after(found["step"]))
        last_returned = found["step"]
    print(last_returned)


def die_before_change(n: int) -> None:
    """Lets the file system be changed n times, then ends this process as SIGKILL would."""
    left = [n]

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **rest: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return real(*args, **rest)

        return call

    for name in ("mkdir", "link", "unlink", "rmdir", "rename", "fsync"):
        setattr(os, name, dying(getattr(os, name)))


def kill_before_each_step(run: str, case: str) -> None:
    """Ends the saving process before its n-th change of the file system, for every n. Prints the number of changes."""
    checkpoint_files.CHUNK_BYTES = CHUNK
    folder, start = Path(run), Path(run).with_name("start")
    for step in (0, 1):
        save(start, state_after(step))
    if case == "damaged":  # so that the previous one is the only hope
        (start / CURRENT / "small.safetensors").write_bytes(b"")
    if case == "missing":
        shutil.rmtree(start / CURRENT)
    for n in range(1000):
        shutil.copytree(start, folder)
        child = os.fork()
        if child == 0:
            die_before_change(n)
            checkpoint_files.THREADS = 1
            save(folder, state_after(2))
            os._exit(0)
        killed = os.waitpid(child, 0)[1] != 0
        found = load(folder).state
        assert found["step"] in ((1, 2) if case == "whole" else (0, 2)), (n, found["step"])
        assert killed or found["step"] == 2
        assert same(found, state_after(found["step"]))
        save(folder, state_after(3))
        assert load(folder).state["step"] == 3
        assert sorted(entry.name for entry in folder.iterdir()) == [CURRENT, PREVIOUS]
        shutil.rmtree(folder)
        if not killed:
            print(n)
            return


def test_killed_at_random_moments_loses_nothing_saved(tmp_path: Path) -> None:
    assert int(in_fresh_process(kill_at_random, str(tmp_path / "run"))) > 30


@pytest.mark.parametrize("case", ["whole", "damaged", "missing"])
def test_killed_before_each_change_of_the_disk(tmp_path: Path, case: str) -> None:
    assert int(in_fresh_process(kill_before_each_step, str(tmp_path / "run"), case)) >= 10


def peak_memory(run: str) -> None:
    """Prints by how many bytes the memory grew at most in saving 128 MiB, half of it strided, in chunks of 1 MiB."""
    import resource

    checkpoint_files.CHUNK_BYTES = 1 << 20
    save(Path(run), {"t": torch.rand(1024, 1024), "s": torch.ones(3).T})
    state = {"strided": torch.rand(4096, 4096).T, "plain": torch.rand(4096, 4096)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save(Path(run), state)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def test_saving_takes_a_few_chunks_of_memory(tmp_path: Path) -> None:
    assert int(in_fresh_process(peak_memory, str(tmp_path / "run"))) < 24 << 20
