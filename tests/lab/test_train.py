"""Training stops, is killed, and goes on as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import launch
from generative.api import Encoder
from lab import checkpoint
from lab.run import derive_seed, forked_seed, seed_everything

ROOT = Path(__file__).parent.parent.parent
WORDS = [
    "env=Catch",
    "wandb=off",
    "frames_per_iteration=320",
    "log_frames=64",
    "num_envs=4",
    "evaluation.num_envs=2",
    "evaluation.video=false",
]
VAE = ["encoder=vae", "fit.frames=320", "fit.updates=6", "fit.batch_size=8"]


def run(tmp_path: Path, name: str, *words: str) -> Path:
    assert launch.main([*WORDS, f"runs_dir={tmp_path}", f"run_name={name}", *words]) == 0
    return tmp_path / name


def metrics(folder: Path) -> list[dict]:
    """Rows without what a clock or the process's size says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "speed/", "memory/process_bytes", "fit/updates_per_second")
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in rows]


def assert_equal(left, right, path: str = "") -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            if f"{path}/{key}" != "/logs/metrics.jsonl":  # its rows hold times of varying length
                assert_equal(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    else:
        assert left == right, path


def assert_same_run(left: Path, right: Path) -> None:
    assert metrics(left) == metrics(right)
    assert (left / "evaluation.csv").read_text() == (right / "evaluation.csv").read_text()
    assert_equal(checkpoint.load(left).state, checkpoint.load(right).state)


@pytest.mark.parametrize("encoder", [[], VAE], ids=["random_projection", "vae"])
def test_stopped_and_resumed_equals_never_stopped(tmp_path, encoder):
    whole = run(tmp_path, "whole", "frames=1600", *encoder)
    half = run(tmp_path, "half", "frames=900", *encoder)
    assert launch.main([f"resume={half}", "frames=1600"]) == 0
    assert_same_run(whole, half)


def test_atari_resumes_bit_for_bit(tmp_path):
    words = ["env=Breakout", "num_envs=2", "env.num_threads=1", "frames_per_iteration=8000", "evaluation.num_envs=1", "agent.k=3"]
    whole = run(tmp_path, "whole", "frames=16000", *words)
    half = run(tmp_path, "half", "frames=8000", *words)
    assert launch.main([f"resume={half}", "frames=16000"]) == 0
    assert_same_run(whole, half)


def test_evaluation_in_the_midst_changes_nothing_in_training(tmp_path):
    one = run(tmp_path, "one", "frames=960", "evaluation.episodes_per_lane=1")
    many = run(tmp_path, "many", "frames=960", "evaluation.episodes_per_lane=9")
    assert metrics(one) == metrics(many)
    assert_equal(checkpoint.load(one).state["agent"], checkpoint.load(many).state["agent"])


def test_seeds_differ_and_repeat(tmp_path):
    first, again = run(tmp_path, "first", "frames=320"), run(tmp_path, "again", "frames=320")
    other = run(tmp_path, "other", "frames=320", "seed=1")
    assert metrics(first) == metrics(again)
    assert metrics(first) != metrics(other)


def test_a_resumed_run_may_change_its_budget_and_nothing_that_counts(tmp_path, capsys):
    folder = run(tmp_path, "run", "frames=320")
    for word in ("agent.k=3", "seed=4", "env=Pong", "num_envs=8", "frames_per_iteration=640"):
        capsys.readouterr()
        assert launch.main([f"resume={folder}", word]) == 2
        assert "cannot be changed" in capsys.readouterr().err
    assert launch.main([f"resume={folder}", "evaluation.episodes_per_lane=2", "frames=640"]) == 0
    assert (folder / "evaluation.csv").read_text().count("\n640,") == 4


def test_configuration_edited_behind_the_checkpoints_back_is_refused(tmp_path, capsys):
    folder = run(tmp_path, "run", "frames=320")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("k: 11", "k: 7"))
    assert launch.main([f"resume={folder}", "frames=640"]) == 2
    assert "config.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[1, 2", "frames: 3", "\x00"])
def test_damaged_configuration_is_refused(tmp_path, capsys, text):
    (tmp_path / "config.yaml").write_text(text)
    assert launch.main([f"resume={tmp_path}"]) == 2
    assert "config.yaml" in capsys.readouterr().err


def test_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    folder, whole = run(tmp_path, "run", "frames=960"), run(tmp_path, "whole", "frames=1280")
    (folder / "checkpoint" / "manifest.json").write_bytes(b"{}")
    capsys.readouterr()
    assert launch.main([f"resume={folder}", "frames=1280"]) == 0
    assert "checkpoint" in capsys.readouterr().out
    assert_same_run(whole, folder)


def test_both_checkpoints_damaged_is_one_line(tmp_path, capsys):
    folder = run(tmp_path, "run", "frames=960")
    for name in ("checkpoint", "checkpoint.previous"):
        (folder / name / "manifest.json").write_bytes(b"")
    capsys.readouterr()
    assert launch.main([f"resume={folder}", "frames=1280"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_logs_that_ran_ahead_are_cut_back(tmp_path):
    whole, half = run(tmp_path, "whole", "frames=640"), run(tmp_path, "half", "frames=320")
    with (half / "metrics.jsonl").open("a") as log:
        log.write('{"frames": 384, "iteration": 2, "train/episodes": 99}\n{"frames": 44')
    with (half / "evaluation.csv").open("a") as log:
        log.write("640,2,0,0,99.0,")
    assert launch.main([f"resume={half}", "frames=640"]) == 0
    assert_same_run(whole, half)


def start(tmp_path: Path, name: str, *words: str) -> subprocess.Popen:
    command = [sys.executable, "launch.py", *WORDS, f"runs_dir={tmp_path}", f"run_name={name}", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists(), process.stdout.read() if process.poll() is not None else "timed out"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_a_short_iteration_and_says_how_to_go_on(tmp_path, number):
    process = start(tmp_path, "run", "frames=100_000_000", "frames_per_iteration=1_000_000", "log_frames=320")
    wait_for(tmp_path / "run" / "evaluation.csv", process)
    time.sleep(1.0)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert f"resume={tmp_path / 'run'}" in out
    state = checkpoint.load(tmp_path / "run").state
    assert 0 < state["frames"] < 1_000_000
    assert state["iteration"] == 1
    assert state["agent"]["memory"]["clock"] > 0
    assert launch.main([f"resume={tmp_path / 'run'}", f"frames={state['frames']}"]) == 0


def test_killed_before_the_first_checkpoint_starts_anew(tmp_path, capsys):
    process = start(tmp_path, "run", "frames=960", "frames_per_iteration=960", "log_frames=64")
    wait_for(tmp_path / "run" / "config.yaml", process)
    process.kill()
    process.communicate()
    assert launch.main([f"resume={tmp_path / 'run'}"]) == 0
    whole = run(tmp_path, "whole", "frames=960", "frames_per_iteration=960")
    if "starts anew" in capsys.readouterr().out:
        assert metrics(tmp_path / "run") == metrics(whole)


def test_killed_at_random_moments_every_run_resumes(tmp_path):
    """At least 20 SIGKILLs in one run, some of them while a checkpoint is being written; the end equals that of a run left alone."""
    frames, folder = 320 * 120, tmp_path / "run"
    words = [f"frames={frames}"]
    chance, kills, process = random.Random(7), 0, start(tmp_path, "run", *words)
    wait_for(folder / "config.yaml", process)
    while kills < 20:
        moment = time.monotonic() + 60
        target = folder / "checkpoint.writing" if chance.random() < 0.5 else folder / "checkpoint"
        while not target.exists() and process.poll() is None and time.monotonic() < moment:
            time.sleep(0.0005)
        if target.name == "checkpoint":
            time.sleep(chance.random() * 0.3)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        command = [sys.executable, "launch.py", f"resume={folder}"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if kills < 20:
            time.sleep(chance.random() * 0.5 + 2.5)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert kills >= 20
    assert_same_run(run(tmp_path, "whole", *words), folder)


def test_loss_that_is_not_finite_ends_with_1(tmp_path, capsys):
    words = [*WORDS, f"runs_dir={tmp_path}", "run_name=run", *VAE, "fit.learning_rate=1e30", "fit.updates=50", "frames=320"]
    assert launch.main(words) == 1
    err = capsys.readouterr().err
    assert "not finite" in err
    assert err.count("\n") == 1


def test_job_fit_whose_loss_is_not_finite_keeps_the_last_good_state(tmp_path):
    data = tmp_path / "frames"
    assert launch.main(["job=collect", "env=Catch", "frames=640", f"data={data}"]) == 0
    words = ["job=fit", "model=vae", f"data={data}", "fit.updates=50", "fit.learning_rate=1e30", "wandb=off", f"runs_dir={tmp_path}"]
    assert launch.main([*words, "run_name=fit"]) == 1
    state = checkpoint.load(tmp_path / "fit", only="model").state
    assert all(torch.isfinite(value).all() for value in state.values())


def test_a_strangers_run_folder_runs_nothing_of_its_own(tmp_path, capsys):
    folder = run(tmp_path, "run", "frames=320")
    config = folder / "config.yaml"
    touched = tmp_path / "touched"
    text = config.read_text().replace("_target_: envs.toy.Catch", f"_target_: os.system\n  command: touch {touched}")
    assert "os.system" in text
    config.write_text(text)
    for words in ([f"resume={folder}"], ["job=evaluate", f"run={folder}"]):
        assert launch.main(words) == 2
        assert "os.system" in capsys.readouterr().err
    assert not touched.exists()


def test_a_mistake_on_resume_leaves_the_folder_as_it_was(tmp_path, capsys):
    folder = run(tmp_path, "run", "frames=320")
    before = (folder / "config.yaml").read_text()
    for word in ("wandb=maybe", "evaluation.num_envs=two", "frames=-1", "device=tpu"):
        assert launch.main([f"resume={folder}", word]) == 2
    assert (folder / "config.yaml").read_text() == before
    assert launch.main([f"resume={folder}", "frames=640"]) == 0


def test_fit_folder_can_be_neither_resumed_nor_evaluated(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("job: fit\n")
    for words in ([f"resume={tmp_path}"], ["job=evaluate", f"run={tmp_path}"]):
        assert launch.main(words) == 2
        assert "job=fit" in capsys.readouterr().err


def test_one_folder_belongs_to_one_process(tmp_path, capsys):
    from lab.folder import lock

    folder = run(tmp_path, "run", "frames=320")
    with lock(folder):
        assert launch.main([f"resume={folder}", "frames=640"]) == 2
    assert "another process" in capsys.readouterr().err
    assert launch.main([f"resume={folder}", "frames=640"]) == 0


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.csv", "config.yaml.writing", "version.json"])
def test_links_in_a_strangers_run_folder_are_not_followed(tmp_path, capsys, name):
    folder, victim = run(tmp_path, "run", "frames=320"), tmp_path / "victim"
    victim.write_text("precious")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    assert launch.main([f"resume={folder}", "frames=640"]) == 2
    assert "link" in capsys.readouterr().err
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("text", ["job: train\n", "job: train\na: &x [1]\nb: *x\n", "job: 3\n", "job: train\n" + "#" * 200_000])
def test_configuration_that_no_run_wrote_is_refused(tmp_path, capsys, text):
    (tmp_path / "config.yaml").write_text(text)
    assert launch.main([f"resume={tmp_path}"]) == 2
    assert "config.yaml is damaged" in capsys.readouterr().err


def test_logs_of_a_run_whose_checkpoints_are_gone_are_put_aside(tmp_path):
    import shutil

    folder = run(tmp_path, "run", "frames=320")
    log = (folder / "metrics.jsonl").read_text()
    for name in ("checkpoint", "checkpoint.previous"):
        shutil.rmtree(folder / name, ignore_errors=True)
    assert launch.main([f"resume={folder}"]) == 0
    assert (folder / "metrics.jsonl.old").read_text() == log


def test_failing_video_does_not_end_the_run(tmp_path, monkeypatch):
    from lab.film import Film

    def fail(*arguments):
        raise RuntimeError("no encoder")

    monkeypatch.setattr(Film, "write", fail)
    run(tmp_path, "run", "frames=320", "evaluation.video=true")


def test_interrupt_while_the_fitted_agent_is_scored_keeps_the_encoder(tmp_path, monkeypatch):
    from lab import train

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return []

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_agent", interrupted)
        words = [*WORDS, f"runs_dir={tmp_path}", "run_name=run", *VAE, "frames=960"]
        assert launch.main(words) == 130
    assert launch.main([f"resume={tmp_path / 'run'}"]) == 0
    assert_same_run(run(tmp_path, "whole", *VAE, "frames=960"), tmp_path / "run")


def test_fitted_encoder_is_reused_by_path(tmp_path):
    first = run(tmp_path, "first", "frames=640", *VAE)
    second = run(tmp_path, "second", "frames=320", "encoder=vae", f"fit.path={first}")
    state = [checkpoint.load(folder, only="agent/encoder").state for folder in (first, second)]
    assert_equal(*state)
    assert metrics(second)[-1]["frames"] == 320


def test_fitted_encoder_of_another_kind_is_refused(tmp_path, capsys):
    first = run(tmp_path, "first", "frames=320")
    assert launch.main([*WORDS, f"runs_dir={tmp_path}", "encoder=vae", f"fit.path={first}", "frames=320"]) == 2
    assert "fit.path" in capsys.readouterr().err


def test_collect_then_fit_then_play(tmp_path, capsys):
    data = tmp_path / "frames"
    assert launch.main(["job=collect", "env=Catch", "frames=640", f"data={data}"]) == 0
    assert launch.main(["job=collect", "env=Catch", "frames=640", f"data={data}"]) == 2
    words = [
        "job=fit",
        "model=vae",
        f"data={data}",
        "fit.updates=4",
        "fit.batch_size=8",
        "wandb=off",
        f"runs_dir={tmp_path}",
        "run_name=fit",
    ]
    assert launch.main(words) == 0
    assert (tmp_path / "fit" / "images" / "reconstructions.png").exists()
    assert (tmp_path / "fit" / "report.html").exists()
    played = run(tmp_path, "played", "frames=320", "encoder=vae", f"fit.path={tmp_path / 'fit'}")
    fitted = checkpoint.load(tmp_path / "fit", only="model").state
    assert_equal(fitted, checkpoint.load(played, only="agent/encoder").state)


def test_evaluate_and_report_a_finished_run(tmp_path, capsys):
    folder = run(tmp_path, "run", "frames=640")
    words = ["job=evaluate", f"run={folder}", "evaluation.num_envs=2", "evaluation.episodes_per_lane=3", "evaluation.video=false"]
    assert launch.main(words) == 0
    assert "6 episodes" in capsys.readouterr().out
    (folder / "report.html").unlink()
    assert launch.main(["job=report", f"run={folder}"]) == 0
    assert (folder / "report.html").exists()


def test_random_state_is_a_function_of_seed_iteration_and_purpose():
    seeds = [derive_seed(seed, iteration, purpose) for seed in (0, 1) for iteration in (0, 1) for purpose in ("env", "train")]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)

    def draws():
        return random.random(), np.random.random(), float(torch.rand(()))

    seed_everything(5)
    expected = [draws(), draws()]
    seed_everything(5)
    first = draws()
    with forked_seed(9):
        inside = draws()
    assert [first, draws()] == expected
    with forked_seed(9):
        assert draws() == inside


def test_a_new_encoder_agent_and_environment_are_two_new_files_each(tmp_path, monkeypatch):
    """Three strangers, each a module and a YAML, play together without an edit elsewhere."""
    import shutil

    from lab import configure

    (tmp_path / "stranger.py").write_text(
        "import torch\n"
        "from agents.random import RandomAgent\n"
        "from envs.toy import Catch\n"
        "class World(Catch):\n    pass\n"
        "class Eye:\n"
        "    def __init__(self, obs_shape, num_actions, device, width=3):\n        self.obs_shape, self.features = obs_shape, width\n"
        "    def state_dict(self):\n        return {}\n"
        "    def load_state_dict(self, state):\n        pass\n"
        "    def encode(self, frames):\n        return frames.flatten(1).float()[:, : self.features]\n"
        "class Player(RandomAgent):\n"
        "    def __init__(self, spec, device, encoder, mood='calm'):\n"
        "        super().__init__(spec, device)\n        self.encoder = encoder\n"
    )
    configs = tmp_path / "configs"
    shutil.copytree(configure.CONFIGS, configs)
    (configs / "env" / "World.yaml").write_text("_target_: stranger.World\n")
    (configs / "model" / "eye.yaml").write_text("_target_: stranger.Eye\nwidth: 5\n")
    (configs / "agent" / "player.yaml").write_text(
        "defaults:\n  - /encoder@_global_.encoder: random_projection\n  - _self_\n_target_: stranger.Player\nmood: wild\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import stranger

    cfg = configure.compose(["agent=player", "env=World", "encoder=eye"], configs)
    env = configure.build(cfg.env, "env", num_envs=2, device=torch.device("cpu"))
    eye = configure.build(cfg.encoder, "encoder", obs_shape=env.spec.obs_shape, num_actions=3, device=torch.device("cpu"))
    player = configure.build(cfg.agent, "agent", spec=env.spec, device=torch.device("cpu"), encoder=eye)
    assert isinstance(env, stranger.World)
    assert isinstance(eye, Encoder)
    assert player.encoder.features == 5
