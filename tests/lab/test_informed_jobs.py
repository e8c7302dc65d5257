"""How a simulator comes to an agent that explores by it: from job=fit, by name, and in one line not at all."""

import json
import shutil
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from short_runs import WORDS, assert_equal, assert_same_run, run

import launch
from agents.informed import InformedExploration
from generative.last_frame import LastFrame
from lab import checkpoint, train
from lab.configure import compose, plain

SIMULATOR = ["simulator=small_recurrent", "simulator.hidden=8", "simulator.factors=8", "simulator.context_frames=3"]
DQN = [
    "agent=dqn",
    "agent.capacity=400",
    "agent.learning_starts_frames=64",
    "agent.update_frames=16",
    "agent.target_frames=128",
    "agent.visit_frames=6",
    "env.size=5",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `fit`, a simulator of Catch that was fitted for a moment, and what passes for others."""
    place = tmp_path_factory.mktemp("informed")
    data = place / "clips"
    assert launch.main(["job=collect", "env=Catch", "env.size=5", "num_envs=4", "frames=800", f"data={data}"]) == 0
    fit = ["job=fit", f"data={data}", "fit.updates=3", "fit.batch_size=4", "fit.checkpoint_updates=3", "wandb=off", f"runs_dir={place}"]
    with redirect_stdout(StringIO()) as printed:
        assert launch.main([*fit, "run_name=fit", *SIMULATOR]) == 0
    assert f"reuse    agent=dqn simulator=small_recurrent fit.path={place / 'fit'}" in printed.getvalue()
    altered(place, "larger", obs_shape=[1, 6, 6])
    altered(place, "deft", num_actions=2)
    altered(place, "sticky", world={"env": "Catch", "protocol": "machado2018"})
    altered(place, "elsewhere", world={"env": "Hatch", "protocol": None})
    altered(place, "older", world=None)
    altered(place, "silent", obs_shape=None)
    (place / "image").mkdir()
    (place / "image" / "config.yaml").write_text("job: fit\nmodel: {}\n")
    return place


def altered(place, name, **state):
    """A copy of the fit whose checkpoint says something else, or nothing where None is given."""
    shutil.copytree(place / "fit", place / name)
    changed = told(place / "fit") | state
    checkpoint.save(place / name, {key: value for key, value in changed.items() if value is not None})


def refused(capsys, tmp_path, *words):
    capsys.readouterr()
    assert launch.main([*WORDS, f"runs_dir={tmp_path / 'runs'}", "frames=320", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not (tmp_path / "runs").exists()
    return line


def told(folder):
    """What a run folder's checkpoint holds."""
    return checkpoint.load(folder).state


def test_a_fitted_simulator_explores_and_resumes_bit_for_bit(tmp_path, place):
    words = [*DQN, *SIMULATOR, f"fit.path={place / 'fit'}", "agent.epsilon_frames=200"]
    whole = run(tmp_path, "whole", "frames=960", *words)
    half = run(tmp_path, "half", "frames=640", *words)
    moved = place / "fit"
    moved.rename(place / "away")  # what it needs, a run holds itself
    try:
        assert launch.main([f"resume={half}", "frames=960"]) == 0
        assert launch.main(["job=evaluate", f"run={half}", "evaluation.video=false", "evaluation.num_envs=2"]) == 0
    finally:
        (place / "away").rename(moved)
    assert_same_run(whole, half)
    assert told(place / "fit")["world"] == {"env": "Catch", "protocol": None}
    state = told(whole)["agent"]["informed"]
    assert_equal(state["simulator"], told(place / "fit")["model"])
    assert state["seen"].shape == (4, 6, 25)
    assert "simulator <b>small_recurrent</b>" in (whole / "report.html").read_text()
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert any(0 < row.get("visits/least", 0) <= 6 for row in rows)


def test_killed_before_its_first_checkpoint_it_takes_the_simulator_again(tmp_path, place):
    folder = run(tmp_path, "run", *DQN, *SIMULATOR, f"fit.path={place / 'fit'}", "frames=320")
    expected = told(folder)["agent"]
    for name in ("checkpoint", "checkpoint.previous"):
        shutil.rmtree(folder / name, ignore_errors=True)
    assert launch.main([f"resume={folder}"]) == 0
    assert_equal(told(folder)["agent"], expected)


def test_a_simulator_without_parameters_needs_no_fit(tmp_path):
    folder = run(tmp_path, "run", *DQN, "simulator=last_frame", "frames=640")
    assert launch.main([f"resume={folder}", "frames=960"]) == 0
    assert_same_run(run(tmp_path, "whole", *DQN, "simulator=last_frame", "frames=960"), folder)


def test_the_simulator_comes_by_name_and_its_memory_is_announced(tmp_path, capsys):
    words = [*WORDS, *DQN, "simulator=last_frame", f"runs_dir={tmp_path}"]
    needed = []
    for frames in (6, 1006):
        training = train.Training(plain(compose([*words, f"agent.visit_frames={frames}"])), torch.device("cpu"), None)
        assert isinstance(training.agent.informed, InformedExploration)
        assert isinstance(training.agent.informed.simulator, LastFrame)
        needed.append(training.agent.lane_bytes(4))
        training.close()
    assert needed[1] - needed[0] == 1000 * 4 * 25
    line = refused(capsys, tmp_path, *DQN, "simulator=last_frame", "agent.visit_frames=1_000_000_000_000")
    assert "will grow to 100,000,00" in line
    assert "lower agent.capacity, agent.visit_frames or frames" in line


def test_of_another_world_of_the_same_pictures_the_user_is_told(tmp_path, place, capsys):
    for name in ("elsewhere", "older"):
        run(tmp_path, name, *DQN, *SIMULATOR, f"fit.path={place / name}", "frames=320")
        said = "the simulator was fitted to Hatch, and this is Catch" in capsys.readouterr().out
        assert said == (name == "elsewhere")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (SIMULATOR, "simulator=small_recurrent has learned nothing: job=fit simulator=small_recurrent data=FOLDER"),
        ([*SIMULATOR, "fit.path=/nowhere"], "fit.path=/nowhere: there is no such folder"),
        ([*SIMULATOR, "fit.path={place}/image"], "that was job=fit; a simulator comes from job=fit simulator=NAME"),
        ([*SIMULATOR, "fit.path={place}/larger"], "simulates pictures of (1, 6, 6) under 3 actions, and Catch here has (1, 5, 5) and 3"),
        ([*SIMULATOR, "fit.path={place}/deft"], "simulates pictures of (1, 5, 5) under 2 actions, and Catch here has (1, 5, 5) and 3"),
        ([*SIMULATOR, "fit.path={place}/sticky"], "was fitted under protocol=machado2018, and this is protocol=None"),
        ([*SIMULATOR, "fit.path={place}/silent"], "does not say what it was fitted to"),
        (
            ["simulator=small_recurrent", "simulator.hidden=8", "fit.path={place}/fit"],
            "fitted with simulator.context_frames=3 simulator.fac",
        ),
        (["simulator=small_feedforward", "fit.path={place}/fit"], "was fitted with simulator=small_recurrent; type that here too"),
        (["simulator=last_frame", "fit.path={place}/fit"], "leave fit.path out"),
        (["simulator=vae"], "simulator=vae: a VAE is no simulator"),
        (["simulator=small"], "there is no simulator=small; the nearest are simulator=small_"),
        (["simulator=last_frame", "agent.visit_sigma=0"], "agent.visit_sigma must be above 0"),
        (["simulator=last_frame", "agent.visit_delta=0.5"], "agent.visit_delta must be a whole number"),
        (["agent=a3c", "simulator=last_frame"], "simulator="),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(tmp_path, place, capsys, words, expected):
    dqn = [] if "agent=a3c" in words else DQN
    assert expected in refused(capsys, tmp_path, *dqn, *(word.format(place=place) for word in words))
