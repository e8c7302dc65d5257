"""job=fit: stopped and gone on with it ends bit for bit as if it had never stopped; curricula to the letter; wrong words in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from short_runs import assert_equal

import launch
from lab import checkpoint
from lab.fit import Phase, phases_of

ROOT = Path(__file__).parents[2]
SMALL = ["fit.batch_size=4", "fit.checkpoint_updates=3", "wandb=off"]
KNOBS = {"updates": 7, "batch_size": 4, "learning_rate": 0.1, "window_steps": None, "horizon": 1, "phases": None}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "clips"
    assert launch.main(["job=collect", "env=Catch", "frames=1_600", "num_envs=4", f"data={folder}"]) == 0
    return folder


def fit(tmp_path, clips, name, *words):
    assert launch.main(["job=fit", f"data={clips}", *SMALL, f"runs_dir={tmp_path}", f"run_name={name}", *words]) == 0
    return tmp_path / name


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "fit/updates_per_second"} for row in rows]


def state_of(folder):
    return {key: value for key, value in checkpoint.load(folder).state.items() if key != "logs"}


def refused(capsys, *words):
    assert launch.main(list(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_phases_take_from_fit_what_they_do_not_say():
    assert phases_of(KNOBS) == [Phase(7, 4, 0.1, None, 1)]
    told = [{"updates": 3}, {"updates": 2, "horizon": 5, "learning_rate": 1, "batch_size": 2, "window_steps": 9}]
    assert phases_of({**KNOBS, "phases": told}) == [Phase(3, 4, 0.1, None, 1), Phase(2, 2, 1, 9, 5)]


@pytest.mark.parametrize("model", ["vae", "nade", "pixelcnn_large"])
def test_stopped_and_gone_on_with_it_ends_bit_for_bit(tmp_path, clips, capsys, model):
    words = [f"model={model}", "fit.updates=9"]
    straight = fit(tmp_path, clips, "straight", *words)
    stopped = fit(tmp_path, clips, "stopped", *words, "fit.updates=3")
    assert state_of(stopped)["fitter"]["update"] == 3
    capsys.readouterr()
    assert launch.main([f"resume={stopped}", "fit.updates=9"]) == 0
    assert "going on at update 3" in capsys.readouterr().out
    assert_equal(state_of(straight), state_of(stopped))
    assert metrics(straight) == metrics(stopped)
    assert launch.main([f"resume={stopped}"]) == 0
    assert "all updates were made already" in capsys.readouterr().out
    assert metrics(straight) == metrics(stopped)


def test_updates_are_rounded_up_to_whole_stretches_and_that_is_said(tmp_path, clips, capsys):
    folder = fit(tmp_path, clips, "rounded", "model=nade", "fit.updates=7")
    assert "7 updates become 9: whole stretches of 3" in capsys.readouterr().out
    assert state_of(folder)["fitter"]["update"] == 9
    assert [row["fit/update"] for row in metrics(folder)] == list(range(1, 10))


def test_each_phase_is_made_as_it_says(tmp_path, clips):
    phases = "fit.phases=[{updates:2},{updates:3,learning_rate:1e-4,batch_size:8}]"
    folder = fit(tmp_path, clips, "phases", "model=vae", phases, "fit.learning_rate=1e-2")
    assert [row["fit/learning_rate"] for row in metrics(folder)] == [1e-2, 1e-2, 1e-4, 1e-4, 1e-4, 1e-4]


def test_a_killed_fit_goes_on(tmp_path, clips):
    words = ["job=fit", "model=vae", f"data={clips}", *SMALL, "fit.updates=60", f"runs_dir={tmp_path}"]
    straight = fit(tmp_path, clips, "straight", "model=vae", "fit.updates=60")
    process = subprocess.Popen([sys.executable, "launch.py", *words, "run_name=killed"], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint.previous").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert launch.main([f"resume={tmp_path / 'killed'}"]) == 0
    assert_equal(state_of(straight), state_of(tmp_path / "killed"))
    assert metrics(straight) == metrics(tmp_path / "killed")


def test_killed_before_its_first_checkpoint_it_starts_anew_and_says_so(tmp_path, clips, capsys):
    folder = fit(tmp_path, clips, "run", "model=nade", "fit.updates=3")
    expected, rows = state_of(folder), metrics(folder)
    for name in ("checkpoint", "checkpoint.previous"):
        (folder / name).exists() and (folder / name).rename(folder / f"{name}.gone")
    assert launch.main([f"resume={folder}"]) == 0
    assert "before its first checkpoint, so it starts anew" in capsys.readouterr().out
    assert_equal(state_of(folder), expected)
    assert metrics(folder) == rows


def test_a_resumed_fit_refuses_what_it_may_not_change(tmp_path, clips, capsys):
    data = tmp_path / "clips"
    collect = ["job=collect", "env=Catch", "num_envs=4", "frames_per_iteration=1_600", f"data={data}"]
    assert launch.main([*collect, "frames=1_600"]) == 0
    folder = fit(tmp_path, data, "run", "model=nade", "fit.updates=3")
    capsys.readouterr()
    assert "fit.batch_size cannot be changed" in refused(capsys, f"resume={folder}", "fit.batch_size=8")
    assert "device, wandb, fit.updates" in refused(capsys, f"resume={folder}", "seed=8")
    assert "that was job=fit, not job=train" in refused(capsys, f"resume={folder}", "job=train")
    assert launch.main([*collect, "frames=3_200"]) == 0
    assert "is not what its checkpoint was made with" in refused(capsys, f"resume={folder}", "fit.updates=6")
    phased = fit(tmp_path, data, "phased", "model=nade", "fit.phases=[{updates:3}]")
    assert "fit.phases tells how many updates" in refused(capsys, f"resume={phased}", "fit.updates=6")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit.phases=3"], "fit.phases is a list"),
        (["fit.phases=[]"], "fit.phases is a list"),
        (["fit.phases=[{horizon:3}]"], "says its updates"),
        (["fit.phases=[{updates:3,speed:1}]"], "says its updates"),
        (["fit.phases=[{updates:3,horizon:1.5}]"], "horizon must be above 0 and whole"),
        (["fit.phases=[{updates:0}]"], "updates must be above 0"),
        (["fit.phases=[{updates:3,learning_rate:-1}]"], "learning_rate must be above 0"),
        (["fit.window_steps=0"], "fit.window_steps"),
        (["fit.horizon=0"], "fit.horizon"),
        (["fit.checkpoint_updates=0"], "fit.checkpoint_updates"),
        (["simulator=vae"], "no simulator"),
        (["simulator=small_feedforward", "model=vae"], "one fit, one model"),
        (["simulator=last_frame"], "nothing to fit"),
        (["simulator=small_recurrent", "fit.horizon=3", "fit.window_steps=12"], "fit.window_steps=12 is too short: 11 known frames"),
        (["model=random_projection"], "nothing to fit"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(tmp_path, clips, capsys, words, expected):
    assert expected in refused(capsys, "job=fit", f"data={clips}", f"runs_dir={tmp_path / 'runs'}", "wandb=off", *words)
    assert not (tmp_path / "runs").exists()


def test_held_out_figures_fall_back_to_nothing_where_none_are_held(tmp_path, clips):
    folder = fit(tmp_path, clips, "all", "model=nade", "fit.updates=3", "fit.heldout=0")
    assert "heldout" not in (folder / "metrics.jsonl").read_text()
    assert torch.isfinite(torch.tensor(metrics(folder)[-1]["fit/nade_loss"]))


def test_a_simulator_is_fitted_by_its_curriculum_and_goes_on_bit_for_bit(tmp_path, clips):
    """Feed-forward and recurrent, with windows of their own; the report calls it by its name."""
    phases = "fit.phases=[{updates:3},{updates:3,horizon:3,window_steps:13,learning_rate:1e-4}]"
    for name in ("small_feedforward", "small_recurrent"):
        words = [f"simulator={name}", "simulator.hidden=16", "simulator.factors=16", phases, "fit.warmup_updates=2"]
        straight = fit(tmp_path, clips, f"{name}-straight", *words)
        rows = metrics(straight)
        assert [row["fit/horizon"] for row in rows] == [1, 1, 1, 3, 3, 3]
        assert {f"fit/heldout_psnr_{horizon}" for horizon in (1, 3, 5)} <= set(rows[-1])
        assert (straight / "images" / "rollouts.png").exists()
        assert (straight / "videos" / "rollouts.mp4").exists()
        report = (straight / "report.html").read_text()
        assert f"<h1>{name} <span>fitted</span></h1>" in report
        assert "What it foretells" in report
        model = state_of(straight)["model"]
        assert model["mean_image"].abs().max() > 0
        stopped = fit(tmp_path, clips, f"{name}-stopped", *words)
        for part in ("checkpoint", "checkpoint.previous"):  # as if it had been stopped after the first stretch
            (stopped / part).rename(stopped / f"{part}.moved")
        (stopped / "checkpoint.previous.moved").rename(stopped / "checkpoint")
        assert state_of(stopped)["fitter"]["update"] == 3
        assert launch.main([f"resume={stopped}"]) == 0
        assert_equal(state_of(straight), state_of(stopped))
        assert metrics(straight) == metrics(stopped)
