"""Dashboards look on: they keep their curve over a resume, and no failure of theirs stops or changes a run."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from envs.api import UserError
from lab import dashboard
from lab.dashboard import Dashboard, has_login, reachable


class FakeRun:
    def __init__(self, made: dict[str, Any]) -> None:
        self.made, self.step, self.url = made, 0, "http://wandb.test/run"
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.defined: list[tuple[str, Any]] = []
        self.fails = self.finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, values: dict[str, Any], step: int) -> None:
        random.random()
        if self.fails:
            raise RuntimeError("lost\nconnection")
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[FakeRun]:
    """A stand-in for the package wandb; the list collects the runs that it started."""
    started: list[FakeRun] = []
    fake: Any = types.ModuleType("wandb")

    def init(**made: Any) -> FakeRun:
        random.random()
        if made["mode"] == "online" and getattr(fake, "refuses", False):
            raise RuntimeError("401 wrong key")
        started.append(FakeRun(made))
        return started[-1]

    fake.init, fake.Settings = init, lambda **settings: settings
    fake.Video = lambda path, format: ("video", path, format)
    fake.Image = lambda path: ("image", path)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_SILENT", "WANDB_DISABLE_WEAVE"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(dashboard, "reachable", lambda address: True)
    return started


def test_off_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    for mode in ("off", False):
        board = Dashboard(tmp_path, mode)
        board.log({"frames": 1})
        board.close()
        assert board.mode == "off"
    assert list(tmp_path.iterdir()) == []


def test_auto_is_online_only_with_a_login(tmp_path: Path, runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch) -> None:
    assert Dashboard(tmp_path).mode == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    board = Dashboard(tmp_path)
    assert board.mode == "online"
    assert board.notes == ["Weights & Biases: http://wandb.test/run"]
    assert [run.made["mode"] for run in runs] == ["offline", "online"]


def test_a_login_in_netrc_counts_for_its_own_host(tmp_path: Path, runs: list[FakeRun]) -> None:
    assert not has_login("https://api.wandb.ai")
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert has_login("https://api.wandb.ai")
    assert not has_login("https://wandb.example.org:8080")
    (tmp_path / "netrc").write_text("machine \n broken")
    assert not has_login("https://api.wandb.ai")


def test_what_the_user_can_put_right(tmp_path: Path, runs: list[FakeRun]) -> None:
    with pytest.raises(UserError, match="auto, online, offline, off"):
        Dashboard(tmp_path, "onlin")
    with pytest.raises(UserError, match="wandb login"):
        Dashboard(tmp_path, "online")


def test_frames_are_every_charts_axis_and_fitting_has_its_own(tmp_path: Path, runs: list[FakeRun]) -> None:
    Dashboard(tmp_path, "offline", {"seed": 1})
    assert ("*", "frames") in runs[0].defined
    assert ("fit/*", "fit/update") in runs[0].defined
    assert runs[0].made["config"] == {"seed": 1}
    assert runs[0].made["dir"] == str(tmp_path)
    assert runs[0].made["settings"]["silent"]


def test_a_resumed_run_continues_the_same_curve(tmp_path: Path, runs: list[FakeRun]) -> None:
    for _ in range(2):
        board = Dashboard(tmp_path, "offline")
        board.log({"frames": 4, "a": 1, "name": "word", "none": None})
        board.video("evaluation/video", tmp_path / "a.mp4", 4)
        board.image("fit/samples", tmp_path / "a.png", 4)
        board.close()
        board.close()
    assert runs[0].made["id"] == runs[1].made["id"]
    assert runs[1].made["resume"] == "allow"
    assert all(run.finished for run in runs)
    steps = [step for run in runs for step, _ in run.rows]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [values for _, values in runs[1].rows] == [
        {"frames": 4.0, "a": 1.0},
        {"frames": 4, "evaluation/video": ("video", str(tmp_path / "a.mp4"), "mp4")},
        {"frames": 4, "fit/samples": ("image", str(tmp_path / "a.png"))},
    ]
    third = Dashboard(tmp_path, "offline")
    runs[2].step = 100  # the server remembers more than the folder does
    third.log({"frames": 8})
    assert runs[2].rows[0][0] == 101


def test_a_failure_is_said_once_and_the_run_goes_on(tmp_path: Path, runs: list[FakeRun]) -> None:
    said: list[str] = []
    board = Dashboard(tmp_path, "offline", say=said.append)
    runs[0].fails = True
    for _ in range(3):
        board.log({"frames": 4})
    board.video("v", tmp_path / "a.mp4", 4)
    board.close()
    assert said == ["the dashboard stopped, the run goes on (RuntimeError: lost connection)"]
    assert board.mode == "off"


def test_random_numbers_of_the_run_are_left_alone(tmp_path: Path, runs: list[FakeRun]) -> None:
    random.seed(5)
    answer = [random.random() for _ in range(3)]
    random.seed(5)
    drawn = [random.random()]
    board = Dashboard(tmp_path, "offline")
    drawn.append(random.random())
    board.log({"frames": 1})
    drawn.append(random.random())
    assert drawn == answer


def test_a_server_that_refuses_or_is_not_there_means_offline(tmp_path: Path, runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    sys.modules["wandb"].refuses = True  # type: ignore[attr-defined]
    board = Dashboard(tmp_path, "online")
    assert board.mode == runs[-1].made["mode"] == "offline"
    assert len(board.notes) == 1
    assert "goes on offline (401 wrong key)" in board.notes[0]
    monkeypatch.setattr(dashboard, "reachable", lambda address: False)
    board = Dashboard(tmp_path, "online")
    assert "127.0.0.1 does not answer" in board.notes[0]
    assert "wandb sync" in board.notes[0]


def test_reachable_asks_the_host_or_the_proxy_and_never_waits_long(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        closed = server.getsockname()[1]
        assert not reachable(f"http://127.0.0.1:{closed}")
        server.listen()
        assert reachable(f"http://127.0.0.1:{closed}/path")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed}")
        assert reachable("http://no-such-host.invalid")
    assert not reachable("http://127.0.0.1:notaport")
    monkeypatch.delenv("http_proxy")

    def never(*address: object, **settings: object) -> None:
        time.sleep(3)
        raise OSError

    monkeypatch.setattr(dashboard.socket, "create_connection", never)
    began = time.monotonic()
    assert not reachable("https://slow.invalid", seconds=0.2)
    assert time.monotonic() - began < 2


def test_tensorboard_rows_fall_on_frames_and_updates(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = Dashboard(tmp_path, "off", tensorboard=True)
    board.log({"frames": 100, "iteration": 1, "train/return_mean": 2.0, "bad": float("nan")})
    board.log({"frames": 0, "fit/update": 7, "fit/elbo": -3.0})
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/return_mean", "fit/update", "fit/elbo"}
    assert [(e.step, e.value) for e in events.Scalars("train/return_mean")] == [(100, 2.0)]
    assert [(e.step, e.value) for e in events.Scalars("fit/elbo")] == [(7, -3.0)]


def test_tensorboard_that_is_not_installed_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        Dashboard(tmp_path, "off", tensorboard=True)


REAL = """
import sys
from pathlib import Path
import agents, generative
from lab.dashboard import Dashboard
for _ in range(2):
    board = Dashboard(Path(sys.argv[1]), "online", {"seed": 1})
    for frames in (100, 200):
        board.log({"frames": frames, "train/return_mean": 1.5})
    board.close()
    print(board.mode, board.notes, file=sys.stderr)
"""


def test_the_real_wandb_without_network_goes_on_offline_quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_SILENT", "WANDB_DISABLE_WEAVE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "run"
    command = [sys.executable, "-c", REAL, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("offline ['Weights & Biases goes on offline (127.0.0.1 does not answer)") for line in lines)
    name = (folder / "wandb" / "id").read_text()
    assert list((folder / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert (folder / "wandb" / "step").read_text() == "4"
