"""A run stops, is killed, is damaged, and goes on as if nothing had happened, or says what is wrong."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from short_runs import ROOT, VAE, WORDS, assert_same_run, metrics, run

import launch
from lab import checkpoint


@pytest.mark.parametrize("encoder", [[], VAE], ids=["random_projection", "vae"])
def test_stopped_and_resumed_equals_never_stopped(tmp_path, encoder):
    whole = run(tmp_path, "whole", "frames=1600", *encoder)
    half = run(tmp_path, "half", "frames=900", *encoder)
    assert launch.main([f"resume={half}", "frames=1600"]) == 0
    assert_same_run(whole, half)


DQN = ["agent=dqn", "agent.capacity=400", "agent.learning_starts_frames=64", "agent.update_frames=16", "agent.target_frames=128"]
NEC = ["agent=neural_episodic_control", "agent.learning_starts_frames=64", "agent.epsilon_frames=400", "agent.capacity=100", "agent.k=5"]
DREAMER = ["agent=dreamer", "simulator=small_recurrent", "simulator.hidden=16", "simulator.factors=16", "simulator.context_frames=2"]
DREAMER += ["agent.learning_starts_frames=200", "agent.train_frames=100", "agent.first_updates=4", "agent.updates=2", "agent.dreams=1"]
DREAMER += ["agent.dream_envs=4", "agent.batch_size=4", "agent.window_steps=4", "agent.capacity=500"]
LEARNERS = {
    "a3c": ["agent=a3c"],
    "a3c-lstm": ["agent=a3c", "agent.recurrent=lstm", "agent.learning_rate_frames=3200"],
    "a3c-straw": ["agent=a3c", "planner=straw", "planner.plan_steps=12", "agent.plan_cost_frames=1200"],
    "a3c_plus-cts": ["agent=a3c_plus"],
    "a3c_plus-rnd": ["agent=a3c_plus", "bonus=rnd"],
    "dqn": DQN,
    "dqn-pixelcnn-eta": [*DQN, "density=pixelcnn", "agent.eta=0.1", "agent.n_steps=3"],
    "dqn-hash_counts": [*DQN, "density=hash_counts", "bonus=inverse", "agent.dueling=true"],
    "dqn-nade": [*DQN, "density=nade"],
    "neural_episodic_control": NEC,
    "dreamer": DREAMER,
    "dqn-vae": [*DQN, "density=vae", "bonus.allow_bound=true"],
}


SLOW = ("dqn-vae",)  # a VAE takes two minutes for its few frames


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, words in LEARNERS.items()]
)
def test_learners_resume_bit_for_bit(tmp_path, words):
    whole = run(tmp_path, "whole", "frames=960", *words)
    half = run(tmp_path, "half", "frames=640", *words)
    assert launch.main([f"resume={half}", "frames=960"]) == 0
    assert_same_run(whole, half)


def test_atari_resumes_bit_for_bit(tmp_path):
    words = ["env=Breakout", "num_envs=2", "env.num_threads=1", "frames_per_iteration=8000", "evaluation.num_envs=1", "agent.k=3"]
    whole = run(tmp_path, "whole", "frames=16000", *words)
    half = run(tmp_path, "half", "frames=8000", *words)
    assert launch.main([f"resume={half}", "frames=16000"]) == 0
    assert_same_run(whole, half)


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
    rows, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while not (rows.exists() and rows.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert f"resume={tmp_path / 'run'}" in out
    state = checkpoint.load(tmp_path / "run").state
    assert 0 < state["frames"] < 1_000_000
    assert state["iteration"] == 1
    assert state["agent"]["memory"]["clock"] > 0
    assert launch.main([f"resume={tmp_path / 'run'}", f"frames={state['frames']}"]) == 0


def test_a_bench_told_to_end_ends_its_run_too(tmp_path):
    runs, common = 'bench.runs=[["env=Catch"]]', 'bench.common=["frames=100_000_000","frames_per_iteration=1_000_000","log_frames=320"]'
    command = [sys.executable, "launch.py", "job=bench", f"runs_dir={tmp_path}", "bench.seeds=[0]", runs, common]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    rows, deadline = tmp_path / "bench-demo" / "env-Catch-seed-0" / "metrics.jsonl", time.monotonic() + 60
    while not (rows.exists() and rows.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "stopped at" in out  # by the run, which saved itself
    assert (rows.parent / "checkpoint").is_dir()


def test_killed_before_the_first_checkpoint_starts_anew(tmp_path, capsys):
    process = start(tmp_path, "run", "frames=960", "frames_per_iteration=960", "log_frames=64")
    wait_for(tmp_path / "run" / "config.yaml", process)
    process.kill()
    process.communicate()
    assert launch.main([f"resume={tmp_path / 'run'}"]) == 0
    whole = run(tmp_path, "whole", "frames=960", "frames_per_iteration=960")
    if "starts anew" in capsys.readouterr().out:
        assert metrics(tmp_path / "run") == metrics(whole)


KILLED = [
    pytest.param([], 20, id="episodic_control"),
    *(pytest.param(LEARNERS[name], 6, id=name) for name in ("neural_episodic_control", "a3c-straw", "dreamer")),
    *(pytest.param(LEARNERS[name], 10, id=name, marks=pytest.mark.slow) for name in ("a3c_plus-cts", "dqn-pixelcnn-eta", "a3c_plus-rnd")),
]


@pytest.mark.parametrize(("words", "kills"), KILLED)
def test_killed_at_random_moments_every_run_resumes(tmp_path, words, kills):
    """SIGKILLs in one run, half of them while a checkpoint is being written; the end equals that of a run left alone."""
    chance, folder, in_writing = random.Random(7), tmp_path / "run", 0
    process, began = start(tmp_path, "run", "frames=100_000_000", *words), 0
    for kill in range(kills):
        version, deadline = folder / "version.json", time.monotonic() + 60
        while not (version.exists() and version.stat().st_mtime_ns > began) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.6)
        if kill % 2:
            while not (folder / "checkpoint.writing").exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.0002)
            in_writing += (folder / "checkpoint.writing").exists()
        assert process.poll() is None, process.stdout.read()
        began = time.time_ns()
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        command = [sys.executable, "launch.py", f"resume={folder}"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(folder / "checkpoint", process)  # on a slow machine every life so far may have been too short for one
    process.kill()
    process.communicate()
    assert in_writing >= kills // 4
    frames = f"frames={checkpoint.load(folder).state['frames'] + 640}"
    assert launch.main([f"resume={folder}", frames]) == 0
    assert_same_run(run(tmp_path, "whole", frames, *words), folder)


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

    folder = run(tmp_path, "run", "frames=320")
    log = (folder / "metrics.jsonl").read_text()
    for name in ("checkpoint", "checkpoint.previous"):
        shutil.rmtree(folder / name, ignore_errors=True)
    assert launch.main([f"resume={folder}"]) == 0
    assert (folder / "metrics.jsonl.old").read_text() == log


def test_interrupt_while_the_fitted_agent_is_scored_keeps_the_encoder(tmp_path, monkeypatch):
    from lab import train

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return []

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_agent", interrupted)
        words = [*WORDS, f"runs_dir={tmp_path}", "run_name=run", *VAE, "frames=960", "evaluation.before=true"]
        assert launch.main(words) == 130
    assert launch.main([f"resume={tmp_path / 'run'}"]) == 0
    assert_same_run(run(tmp_path, "whole", *VAE, "frames=960", "evaluation.before=true"), tmp_path / "run")
