"""Training: seeds, evaluation, fitting, and the jobs around it."""

import json
import math
import random
import shlex
import shutil

import numpy as np
import pytest
import torch
from short_runs import VAE, WORDS, assert_equal, metrics, run

import launch
from generative.clips import ClipData
from generative.nade import NADE
from lab import checkpoint
from lab.logging import read_evaluation
from lab.run import derive_seed, forked_seed, seed_everything


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


def test_fit_folder_cannot_be_evaluated(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("job: fit\n")
    assert launch.main(["job=evaluate", f"run={tmp_path}"]) == 2
    assert "job=fit" in capsys.readouterr().err


def test_resume_takes_no_other_job(tmp_path, capsys):
    for job, expected in (("evaluate", f"job=evaluate run={tmp_path}"), ("bench", "type job=bench without resume=")):
        assert launch.main([f"resume={tmp_path}", f"job={job}"]) == 2
        assert expected in capsys.readouterr().err


def test_what_is_printed_to_be_typed_next_can_be_pasted(tmp_path, capsys):
    data, runs = tmp_path / "with space" / "it's", tmp_path / "a b"
    assert launch.main(["job=collect", "env=Catch", "frames=640", f"data={data}"]) == 0
    words = shlex.split(capsys.readouterr().out.split("launch.py")[1])
    fit = [*words, "fit.updates=2", "fit.batch_size=8", "wandb=off", f"runs_dir={runs}", "run_name=fit"]
    assert launch.main(fit) == 0
    assert f"'fit.path={runs / 'fit'}'" in capsys.readouterr().out
    assert launch.main(fit) == 2
    told = capsys.readouterr().err
    assert "choose another run_name" in told
    assert "resume" not in told
    (runs / "fit" / "config.yaml").write_text("job: train\n")
    assert launch.main([*WORDS, f"runs_dir={runs}", "run_name=fit"]) == 2
    assert f"go on with it by 'resume={runs / 'fit'}' or choose another run_name" in capsys.readouterr().err


def test_failing_video_does_not_end_the_run(tmp_path, monkeypatch):
    from lab.film import Film

    def fail(*arguments):
        raise RuntimeError("no encoder")

    monkeypatch.setattr(Film, "write", fail)
    run(tmp_path, "run", "frames=320", "evaluation.video=true")


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


def test_density_is_fitted_and_scored_on_frames_held_out(tmp_path, capsys):
    data = tmp_path / "frames"
    assert launch.main(["job=collect", "env=Catch", "frames=400", f"data={data}"]) == 0
    words = [
        "job=fit",
        "model=nade",
        "model.levels=2",
        f"data={data}",
        "fit.updates=200",
        "fit.checkpoint_updates=20",
        "wandb=off",
        f"runs_dir={tmp_path}",
        "run_name=fit",
    ]
    assert launch.main([*words, "fit.heldout=1.5"]) == 2
    assert "fit.heldout is a share" in capsys.readouterr().err
    assert launch.main(words) == 0
    told = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "fit" / "metrics.jsonl").read_text().splitlines()]
    scores = [row["fit/heldout_bits_per_dim"] for row in rows if "fit/heldout_bits_per_dim" in row]
    assert len(scores) == 10
    assert scores[-1] < 0.5 * scores[0]
    assert f"heldout_bits_per_dim {scores[-1]:.4g}" in told
    model = NADE(ClipData(data).obs_shape, 1, "cpu", levels=2)
    model.load_state_dict(checkpoint.load(tmp_path / "fit", only="model").state)
    held = ClipData(data).batch(torch.arange(368, 400))  # the last two of 25 steps of 16 lanes
    assert scores[-1] == pytest.approx(float(-model.log_prob(held).mean()) / math.prod(model.obs_shape) / math.log(2), rel=1e-5)
    assert launch.main([*words, "fit.heldout=0", "run_name=all"]) == 0
    assert "heldout" not in (tmp_path / "all" / "metrics.jsonl").read_text()


def test_evaluate_and_report_a_finished_run(tmp_path, capsys):
    folder = run(tmp_path, "run", "frames=640")
    words = ["job=evaluate", f"run={folder}", "evaluation.num_envs=2", "evaluation.episodes_per_lane=3", "evaluation.video=false"]
    assert launch.main(words) == 0
    assert "6 episodes" in capsys.readouterr().out
    (folder / "report.html").unlink()
    assert launch.main(["job=report", f"run={folder}"]) == 0
    assert (folder / "report.html").exists()


def test_evaluation_epsilon_is_the_run_s_unless_it_is_given(tmp_path, capsys):
    folder = run(tmp_path, "run", "agent=dqn", "agent.learning_starts_frames=1_000", "frames=320", "evaluation.epsilon=0.25")
    words = ["job=evaluate", f"run={folder}", "evaluation.num_envs=2", "evaluation.episodes_per_lane=1", "evaluation.video=false"]
    for own, epsilon in (([], 0.25), (["evaluation.epsilon=1"], 1), (["evaluation.epsilon=0"], 0)):
        assert launch.main([*words, *own]) == 0
        assert f"epsilon {epsilon:g}," in capsys.readouterr().out
        assert {row["epsilon"] for row in read_evaluation(folder / "evaluations" / "frames-320-seed-0")} == {epsilon}
    assert launch.main([*words, "evaluation.epsilon=1.5"]) == 2
    assert "evaluation.epsilon is a share of the actions, from 0 to 1" in capsys.readouterr().err
    assert launch.main([f"resume={folder}", "frames=640", "evaluation.epsilon=null", "evaluation.num_envs=2"]) == 0
    assert read_evaluation(folder)[-1]["epsilon"] == 0


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

    from lab import configure, train

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

    short = ["frames=64", "frames_per_iteration=64", "num_envs=4", "wandb=off", "evaluation.num_envs=2", "evaluation.video=false"]
    words = ["agent=player", "env=World", "encoder=eye", f"runs_dir={tmp_path}", "run_name=strangers", *short]
    training = train.Training(configure.plain(configure.compose(words, configs)), torch.device("cpu"), None)
    assert isinstance(training.env, stranger.World)
    assert isinstance(training.agent, stranger.Player)
    assert isinstance(training.models["encoder"], stranger.Eye)
    assert training.models["encoder"].features == 5
    assert training.run() == 0
    training.close()
    assert (tmp_path / "strangers" / "report.html").exists()
