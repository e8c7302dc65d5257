"""The door to the second Atari backend, on a stand-in for EnvPool: it trains, films, resumes and evaluates, or says in one line why not."""

import inspect
import re
import sys

import pytest
import torch
import yaml
from fake_envpool import STEPS_TO_THE_END, FakeEnvPool

import launch
from agents.loop import Tick
from envs.atari import AtariEnv
from envs.atari_envpool import EnvPoolAtari
from envs.protocols import PROTOCOLS
from lab.configure import compose, plain
from lab.film import ATARI_FPS, Film
from lab.folder import parse_yaml
from lab.run import BACKENDS, make_env

CPU = torch.device("cpu")
WORDS = ["env=Pong", "env.num_threads=1", "agent=random", "num_envs=2", "frames=320", "frames_per_iteration=320", "log_frames=160"]
QUIET = ["wandb=off", "evaluation.num_envs=2", "evaluation.episodes_per_lane=2"]


@pytest.fixture
def envpool(monkeypatch) -> FakeEnvPool:
    fake = FakeEnvPool()
    monkeypatch.setitem(sys.modules, "envpool", fake)
    return fake


def env_of(*words: str) -> object:
    return make_env(plain(compose(["agent=random", *words])), 2, CPU)


def test_ale_is_the_default_and_envpool_is_chosen_by_its_key(envpool):
    assert isinstance(env_of("env=Pong"), AtariEnv)
    assert isinstance(env_of("env=Pong", "env.backend=ale"), AtariEnv)
    env = env_of("env=MsPacman", "env.backend=envpool", "env.obs=rgb64", "env.num_threads=1", "protocol=machado2018")
    assert isinstance(env, EnvPoolAtari)
    assert (env.spec.name, env.spec.obs_shape, env.num_threads) == ("MsPacman", (3, 64, 64), 1)
    assert env.protocol == PROTOCOLS["machado2018"]
    cfg = plain(compose(["agent=random", "env=Pong", "env.backend=envpool", "protocol=nature2015"]))
    assert make_env(cfg, 1, CPU, for_evaluation=True).protocol == PROTOCOLS["nature2015"].for_evaluation()


def test_runs_from_before_there_was_a_choice_are_of_ale():
    cfg = plain(compose(["agent=random", "env=Pong"]))
    del cfg["env"]["backend"]
    assert isinstance(make_env(cfg, 1, CPU), AtariEnv)


def test_backends_take_the_same_knobs():
    ours, theirs = (inspect.signature(cls).parameters for cls in (EnvPoolAtari, AtariEnv))
    assert list(ours.values()) == list(theirs.values())
    assert BACKENDS == {"ale": "envs.atari.AtariEnv", "envpool": "envs.atari_envpool.EnvPoolAtari"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["env=Pong", "env.backend=gym"], "there is no env.backend=gym; there are ale and envpool"),
        (["env=Pong", "env.backend=null"], "there is no env.backend=None"),
        (["env=Pong", "env.backend=[ale]"], "there is no env.backend="),
        (["env=Catch", "env.backend=envpool"], "env.backend"),
        (["env=Pong", "env.backend=envpool", "env.obs=grey85"], "obs must be one of"),
        (["env=Pong", "env.backend=envpool", "env.threads=2"], "env.threads"),
        (["env=Pong", "env.backend=envpool", "record_actions=true"], "record_actions=true needs env.backend=ale"),
    ],
)
def test_mistakes_are_one_line(envpool, words, expected, tmp_path, capsys):
    assert launch.main([*words, "agent=random", "wandb=off", f"runs_dir={tmp_path}"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert expected in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("job", ["train", "collect"])
def test_where_envpool_is_not_installed_one_line_says_how_to(job, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "envpool", None)
    words = ["env=Pong", "env.backend=envpool", "agent=random", *(["wandb=off", f"runs_dir={tmp_path}"] if job == "train" else [])]
    assert launch.main([f"job={job}", *words, *([f"data={tmp_path / 'frames'}"] if job == "collect" else [])]) == 2
    line = capsys.readouterr().err
    assert 'pip install "reverie[envpool]"' in line
    assert line.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_names_the_backends(capsys):
    assert launch.main(["--help"]) == 0
    assert re.search(r"env\.backend: ale .*envpool", capsys.readouterr().out)


def test_it_trains_films_resumes_and_is_evaluated(envpool, tmp_path, capsys):
    assert launch.main([*WORDS, *QUIET, "env.backend=envpool", f"runs_dir={tmp_path}", "run_name=run"]) == 0
    folder = tmp_path / "run"
    cfg = parse_yaml((folder / "config.yaml").read_text())
    assert cfg["env"]["backend"] == "envpool"
    assert "<span>backend <b>envpool</b></span>" in (folder / "report.html").read_text()
    assert launch.main([f"resume={folder}", "frames=640"]) == 0
    assert launch.main(["job=evaluate", f"run={folder}", "evaluation.num_envs=2", "evaluation.episodes_per_lane=2"]) == 0
    assert len(envpool.pools) >= 5  # two iterations, their evaluations and the last
    assert len(list(folder.glob("videos/*.mp4"))) >= 3
    assert "no video" not in capsys.readouterr().out
    lengths = [row.split(",")[5] for row in (folder / "evaluation.csv").read_text().splitlines()[1:]]
    assert set(lengths) == {str(4 * steps) for steps in STEPS_TO_THE_END.values()}


def test_a_damaged_backend_of_a_run_folder_is_one_line(envpool, tmp_path, capsys):
    assert launch.main([*WORDS, *QUIET, "evaluation.video=false", f"runs_dir={tmp_path}", "run_name=run"]) == 0
    assert "backend <b>" not in (tmp_path / "run" / "report.html").read_text()
    path = tmp_path / "run" / "config.yaml"
    cfg = parse_yaml(path.read_text())
    cfg["env"]["backend"] = "os.system"
    path.write_text(yaml.safe_dump(cfg))
    assert launch.main([f"resume={tmp_path / 'run'}", "frames=640"]) == 2
    assert "env.backend=os.system" in capsys.readouterr().err


def test_its_film_is_what_the_lane_saw_at_the_speed_of_atari(envpool, tmp_path, monkeypatch):
    written = {}
    monkeypatch.setattr("lab.film.write_mp4", lambda path, pictures, fps, scale: written.update(pictures=pictures, fps=fps, scale=scale))
    env = EnvPoolAtari("Pong", 2, "cpu", PROTOCOLS["mfec2016"])
    film, step = Film(env, 0), env.reset(0)
    still = torch.zeros(2, dtype=torch.int64)
    for played in range(20):
        after = env.step(still)
        film.watch(Tick(played, step, type("Decision", (), {"action": still})(), after, {}, {}))
        step = after
    film.write(tmp_path / "film.mp4")
    assert written["fps"] == ATARI_FPS
    assert [int(picture[0, 2, 0]) for picture in written["pictures"]] == list(
        range(STEPS_TO_THE_END[0] + 1)
    )  # the first episode, its end too
    assert written["pictures"][0].shape == (84, 84, 3)
    assert all(picture.untyped_storage().nbytes() == 84 * 84 for picture in film._pictures)
