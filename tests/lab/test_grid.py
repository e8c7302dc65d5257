"""What a bench refuses before its first run starts, and which run folders it takes up again."""

import json
from types import SimpleNamespace

import pytest
import yaml

import launch
from envs.api import UserError
from lab.bench import run
from lab.configure import compose, plain
from lab.grid import bench_folder, plan

COMMON = ["frames=640", "frames_per_iteration=320", "num_envs=4", "log_frames=64", "evaluation.num_envs=2", "evaluation.video=false"]
MADE_BY = ["seed=0", "device=cpu", "runs_dir=elsewhere", "run_name=it", "wandb=off"]


def bench(*more, **changes):
    return {"name": "b", "common": [*COMMON, *more], "runs": [["env=Catch"]], "seeds": [0]} | changes


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr("lab.bench._train", lambda one, device: pytest.fail("a run started"))


@pytest.fixture
def in_process(monkeypatch):
    """Runs of a bench without a process each."""

    class Process:
        def __init__(self, command):
            self.code = launch.main(command[2:])

        def wait(self):
            return self.code

    monkeypatch.setattr("lab.bench.subprocess", SimpleNamespace(Popen=Process))


def trained(tmp_path, *words, frames=(0, 320, 640), without=()):
    """The folder of a bench's one run as if it had been trained with these words and evaluated at these frames."""
    folder = tmp_path / "env-Catch-seed-0"
    folder.mkdir()
    cfg = plain(compose([*COMMON, "env=Catch", *MADE_BY, *words]))
    for key in without:
        *groups, name = key.split(".")
        node = cfg
        for group in groups:
            node = node[group]
        del node[name]
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg, sort_keys=False))
    (folder / "evaluation.csv").write_text("\n".join(["frames,return", *(f"{at},1.0" for at in frames)]) + "\n")
    return folder


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
        ({"games": ["Pong", "Qbertt"], "runs": [["agent=a3c"]]}, r"env=Qbertt agent=a3c: there is no env=Qbertt; the nearest are env=Q"),
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


def test_settings_of_many_words_have_folders_of_their_own_that_fit_a_file_system(tmp_path):
    many = [f"agent.{knob}={value}" for knob, value in (("gamma", 0.987654), ("value_cost", 0.123456), ("entropy_cost", 0.00123456))]
    many += ["agent.learning_rate=0.000123456", "agent.optimiser_epsilon=0.000123456", "agent.learning_rate_frames=123456789"]
    runs = [["agent=a3c", *many, "agent.max_gradient_norm=0.123456", f"agent.n_steps={steps}"] for steps in (5, 6)]
    names = [run.folder.name for run in plan(bench(runs=runs, seeds=[0, 281474976710656]), tmp_path)]
    assert len(" ".join(runs[0])) > 200
    assert len(set(names)) == 4
    for name in names:
        (tmp_path / name).mkdir()
    assert names == [run.folder.name for run in plan(bench(runs=runs, seeds=[0, 281474976710656]), tmp_path / "again")]


def test_seeds_and_settings_become_runs(tmp_path):
    planned = plan(bench(games=["Pong", "Qbert"], runs=[["agent=a3c"]], seeds=[3, 1]), tmp_path)
    assert [(one.label, one.seed) for one in planned] == [(f"env={game} agent=a3c", seed) for seed in (3, 1) for game in ("Pong", "Qbert")]
    assert planned[0].folder == tmp_path / "env-Pong-agent-a3c-seed-3"
    assert planned[0].words == (*COMMON, "env=Pong", "agent=a3c")
    assert planned[0].frames == 640
    assert not planned[0].finished()


@pytest.mark.parametrize(
    ("made", "now", "there", "here"),
    [
        (["agent.gamma=0.9"], ["agent.gamma=0.99"], "agent.gamma=0.9", "agent.gamma=0.99"),
        (["agent=a3c"], ["agent=dqn"], "agent=a3c", "agent=dqn"),
        (["agent=dqn"], ["agent=dqn", "density=cts"], "no density", "density=cts"),
        (["agent=dqn", "density=cts"], ["agent=dqn"], "density=cts", "no density"),
        ([], ["evaluation.num_envs=3"], "evaluation.num_envs=2", "evaluation.num_envs=3"),
        ([], ["record_actions=true"], "record_actions=False", "record_actions=True"),
        ([], ["frames=300"], "frames=640", "frames=300"),
    ],
)
def test_a_folder_that_was_trained_otherwise_is_refused(tmp_path, made, now, there, here):
    folder = trained(tmp_path, *made)
    with pytest.raises(UserError) as refused:
        plan(bench(*now), tmp_path)
    advice = "choose another bench.name or delete the folder"
    assert str(refused.value) == f"{folder} was trained with {there}, the bench now says {here}; {advice}"


def test_what_does_not_matter_may_differ(tmp_path):
    trained(tmp_path, "device=auto", "evaluation.video=true", "log_frames=32", "checkpoint_frames=640", "tensorboard=true")
    (one,) = plan(bench(), tmp_path)
    assert one.finished()


@pytest.mark.parametrize(("frames", "finished"), [(640, True), (600, True), (321, True), (641, False), (5_000, False)])
def test_frames_are_those_of_whole_iterations(tmp_path, frames, finished):
    trained(tmp_path, "frames=600")
    (one,) = plan(bench(f"frames={frames}"), tmp_path)
    assert one.finished() == finished


def test_keys_that_came_later_count_as_their_defaults(tmp_path):
    trained(tmp_path, "agent=a3c_plus", without=["record_actions", "env.pixels_per_cell", "agent.precision", "density.levels"])
    (one,) = plan(bench("agent=a3c_plus"), tmp_path)
    assert one.finished()
    with pytest.raises(UserError, match=r"trained with env\.pixels_per_cell=1, the bench now says env\.pixels_per_cell=2"):
        plan(bench("agent=a3c_plus", "env.pixels_per_cell=2"), tmp_path)


def test_a_bench_of_more_frames_goes_on(tmp_path, in_process):
    words = ["job=bench", 'bench.runs=[["env=Catch"]]', "bench.seeds=[0]", f"runs_dir={tmp_path}"]
    assert launch.main([*words, f"bench.common={json.dumps(COMMON)}"]) == 0
    rows = (tmp_path / "bench-demo" / "env-Catch-seed-0" / "evaluation.csv").read_text()
    assert launch.main([*words, f"bench.common={json.dumps([*COMMON, 'frames=960'])}"]) == 0
    more = (tmp_path / "bench-demo" / "env-Catch-seed-0" / "evaluation.csv").read_text()
    assert more.startswith(rows)
    assert more.splitlines()[-1].startswith("960,")
    assert "| env=Catch | 960 | 1 |" in (tmp_path / "bench-demo" / "table.md").read_text()


def test_no_run_finished_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lab.bench._train", lambda one, device: 2)
    words = ["job=bench", 'bench.runs=[["env=Catch"],["env=Cue"]]', "bench.seeds=[0,1]", f"runs_dir={tmp_path}"]
    assert launch.main(words) == 1
    said = "error: no run finished: env=Catch ended with exit code 2, env=Cue ended with exit code 2\n"
    assert capsys.readouterr().err == said
    assert not list(tmp_path.iterdir())
