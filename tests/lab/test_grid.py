"""What a bench refuses before its first run starts."""

import pytest

import launch
from envs.api import UserError
from lab.bench import run
from lab.configure import compose
from lab.grid import bench_folder, plan

COMMON = ["frames=640", "frames_per_iteration=320", "num_envs=4", "log_frames=64", "evaluation.num_envs=2", "evaluation.video=false"]


def bench(*more, **changes):
    return {"name": "b", "common": [*COMMON, *more], "runs": [["env=Catch"]], "seeds": [0]} | changes


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr("lab.bench._train", lambda one, device: pytest.fail("a run started"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [0, 0]}, r"bench\.seeds must differ.*\[0, 0\]"),
        ({"seeds": [0, -1]}, r"bench\.seeds must be a whole number from 0 to 2\^48, got -1"),
        ({"seeds": [0, "x"]}, r"bench\.seeds.* got x"),
        ({"common": ["seed=3"]}, r"bench\.common holds seed=3, but a bench sets seed itself; .*bench\.seeds"),
        ({"runs": [["env=Catch", "seed=3"]]}, r"bench\.runs holds seed=3"),
        ({"runs": [["env=Catch", "run_name=mine"]]}, r"bench\.runs holds run_name=mine"),
        ({"runs": [["env=Catch"], ["env=Catch"]]}, r"bench\.runs .*env=Catch more than once"),
        ({"games": ["Pong", "Qbert", "Pong"], "runs": [["agent=a3c"]]}, r"bench\.games holds env=Pong agent=a3c more than once"),
        ({"runs": [["env=Catch"], ["env=Catch", "agent.gamm=1"]]}, r"env=Catch agent\.gamm=1: there is no key agent\.gamm"),
        ({"games": ["Pong", "Qbertt"], "runs": [["agent=a3c"]]}, r"env=Qbertt agent=a3c: there is no env=Qbertt.* Qbert"),
        ({"common": ["frames=many"]}, r"env=Catch: frames must be a whole number"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        plan(bench() | changes, tmp_path)


@pytest.mark.parametrize("name", ["../../evil", "", None, "a b"])
def test_a_name_stays_in_its_folder(tmp_path, name):
    with pytest.raises(UserError, match=r"bench\.name must be made of"):
        bench_folder({"name": name}, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench=exploration", 'bench.baseline=["agent=a3d"]'], r"bench\.baseline must be one of bench\.runs.*agent=a3d"),
        (["bench=exploration", "bench.baseline=null"], r"bench\.baseline"),
        (["bench=exploration", "bench.kind=explore"], r"there is no bench\.kind=explore; there are exploration, salient_event"),
        (["bench=demo", 'bench.runs=[["env=Catch"],["env=Cue","agent.key_frame=4"]]'], r"there is no key agent\.key_frame"),
        (["bench=demo", "device=tpu"], "device must be auto, cpu or cuda"),
    ],
)
def test_a_bench_finds_its_own_mistakes_before_anything_runs(tmp_path, no_training, words, message):
    with pytest.raises(UserError, match=message):
        run(compose(["job=bench", f"runs_dir={tmp_path}", *words]))
    assert not list(tmp_path.iterdir())


def test_seeds_and_settings_become_runs(tmp_path):
    planned = plan(bench(games=["Pong", "Qbert"], runs=[["agent=a3c"]], seeds=[3, 1]), tmp_path)
    assert [(one.label, one.seed) for one in planned] == [(f"env={game} agent=a3c", seed) for seed in (3, 1) for game in ("Pong", "Qbert")]
    assert planned[0].folder == tmp_path / "env-Pong-agent-a3c-seed-3"
    assert planned[0].words == (*COMMON, "env=Pong", "agent=a3c")
    assert planned[0].frames == 640
    assert not planned[0].finished()


def test_no_run_finished_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lab.bench._train", lambda one, device: 2)
    words = ["job=bench", 'bench.runs=[["env=Catch"],["env=Cue"]]', "bench.seeds=[0,1]", f"runs_dir={tmp_path}"]
    assert launch.main(words) == 1
    said = "error: no run finished: env=Catch ended with exit code 2, env=Cue ended with exit code 2\n"
    assert capsys.readouterr().err == said
    assert not list(tmp_path.iterdir())
