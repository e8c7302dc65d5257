"""The door: what a user types, right and wrong. A mistake is one line on stderr and exit code 2."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_vizdoom import FakeViZDoom

import launch
from generative.api import Density, Encoder, Planner, Simulator, Trainable
from lab.configure import CONFIGS, build, compose, plain, within_memory
from lab.folder import parse_yaml
from lab.grid import plan

ROOT = Path(__file__).parent.parent
SHORT = ["wandb=off", "frames=640", "frames_per_iteration=320", "log_frames=64", "num_envs=4"]
SHORT_EVALUATION = ["evaluation.num_envs=2", "evaluation.video=false"]


def train(tmp_path, *words: str, name: str = "run") -> int:
    return launch.main(["env=Catch", *SHORT, *SHORT_EVALUATION, f"runs_dir={tmp_path}", f"run_name={name}", *words])


def refused(capsys, *words: str) -> str:
    """The one line that the words earn."""
    capsys.readouterr()
    assert launch.main(list(words)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in out + err
    return err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["env=Pnog"], "Pong"),
        (["env=joust"], "env=joust"),
        (["agent=episodic_contrl"], "episodic_control"),
        (["encoder=vea"], "vae"),
        (["agent=random", "encoder=vae"], "encoder="),
        (["env=Catch", "protocol=mfec2016"], "protocol="),
        (["experiment=dqn_cts", "env=Catch"], "experiment=dqn_cts chooses protocol=, which only Atari has"),
        (["experiment=mfec_vae", "agent=dqn"], "experiment=mfec_vae chooses encoder=, which"),
        (["run_name=a${b}c"], "run_name=a${b}c is not understood"),
        (["run_name=a${b"], "run_name=a${b is not understood"),
        (["protocol=mfec2017"], "mfec2016"),
        (["job=trian"], "train"),
        (["frams=1000"], "frames"),
        (["agent.kk=3"], "agent.kk"),
        (["env=Catch", "+agent.kk=3"], "agent.kk"),
        (["env=Catch", "agent.k=many"], "agent.k must be a whole number"),
        (["env=Catch", "agent.k=2.5"], "agent.k must be a whole number"),
        (["env=Catch", "agent.search=annoy"], "annoy"),
        (["env=Catch", "agent.epsilon=2"], "epsilon"),
        (["env=Catch", "agent.capacity=0"], "capacity"),
        (["frames=0"], "frames must be"),
        (["frames=-5"], "frames must be"),
        (["frames=lots"], "frames must be"),
        (["num_envs=0"], "num_envs must be"),
        (["seed=-1"], "seed must be"),
        (["seed=first"], "seed must be"),
        (["seed=281474976710657"], "from 0 to 2^48"),
        (["env=Catch", "agent=dqn", "density=cts", "fit.path=/tmp"], "leave fit.path out"),
        (["env=Catch", "fit.path=/tmp"], "leave fit.path out"),
        (["checkpoint_frames=1_500_000"], "multiple"),
        (["evaluation.episodes_per_lane=0"], "evaluation.episodes_per_lane"),
        (["fit.updates=-1"], "fit.updates"),
        (["fit.updates=2.5"], "fit.updates must be a whole number"),
        (["fit.batch_size=many"], "fit.batch_size must be a whole number"),
        (["evaluation.num_envs=100_000_000_000"], "evaluation.num_envs must be at most 65536"),
        (["job=evaluate", "run=/nowhere", "evaluation.num_envs=65_537"], "evaluation.num_envs must be at most 65536"),
        (["evaluation.num_envs=two"], "evaluation.num_envs must be a whole number"),
        (["evaluation.episodes_per_lane=1.5"], "evaluation.episodes_per_lane must be a whole number"),
        (["evaluation.video=maybe"], "evaluation.video must be true or false"),
        (["env=Catch", "encoder.features=0"], "features"),
        (["env=Catch", "agent=a3c", "planner=straww"], "straw"),
        (["env=Catch", "agent=a3c", "planner=vae"], "planner=vae: a VAE is no planner"),
        (["env=Catch", "agent=dqn", "planner=straw"], "planner="),
        (["env=Catch", "encoder=straw"], "encoder=straw: a Straw is no encoder"),
        (["env=Catch", "agent=a3c", "planner=straw", "agent.recurrent=lstm"], "agent.recurrent=lstm"),
        (["env=Catch", "agent=a3c", "planner=straw", "planner.filters=0"], "planner.filters must be from 1 to 100, got 0"),
        (["env=Catch", "agent=a3c", "planner=straw", "planner.plan_steps=1e6"], "planner.plan_steps must be from 1 to 10,000"),
        (["env=Catch", "agent=a3c", "planner=straw", "planner.replan_cost=-1"], "planner.replan_cost must be from 0 to 1,000,000, got -1"),
        (["env=Catch", "agent=a3c", "planner=straw", "planner.hidden=1_000_000_000_000"], "planner does not fit into memory"),
        (["env=Catch", "encoder=vae", "encoder.latents=0"], "latents"),
        (["env=Catch", "encoder=vae", "encoder.architecture=big"], "architecture"),
        (["env=Catch", "encoder=vae", "encoder.likelihood=cauchy"], "likelihood"),
        (["agent=null"], "agent"),
        (["encoder=null"], "encoder"),
        (["+foo=1"], "foo"),
        (["env=Pong", "+protocol.sticky=3"], "protocol"),
        (["~agent"], "key=value"),
        (["agent@other=random"], "key=value"),
        (["frames=1e30"], "frames must be"),
        (["num_envs=1_000_000_000"], "num_envs must be"),
        (["tensorboard=maybe"], "tensorboard"),
        (["seed=true"], "seed must be"),
        (["evaluation=3"], "evaluation"),
        (["fit=null"], "fit"),
        (["env=Catch", "agent._target_=nope.Nope"], "nope"),
        (["env=Catch", "encoder.features=10_000_000_000_000"], "memory"),
        (["env=Catch", "agent=a3c_plus", "density=pixelcnn", "density.planes=1_000_000_000"], "density does not fit into memory"),
        (["env=Catch", "agent=a3c_plus", "density=pixelcnn", "density.planes=16_000_000_000"], "density does not fit into memory"),
        (["env=Catch", "encoder.features=100_000_000_000_000_000_000"], "encoder.features must be at most 2^48"),
        (["job=collect", "env=Catch", "data="], "data"),
        (["job=collect", "env=Catch", "data=null"], "data"),
        (["job=bench", "bench.runs=[3]"], "runs"),
        (["job=bench", "bench.seeds=5"], "seeds"),
        (["hello"], "key=value"),
        (["frames=[1"], "frames"),
        (["experiment=none_such"], "none_such"),
        (["job=fit"], "data="),
        (["job=fit", "data=/nowhere/at/all"], "/nowhere/at/all"),
        (["job=evaluate"], "run="),
        (["job=evaluate", "run=/nowhere"], "/nowhere"),
        (["job=report", "run=/nowhere"], "/nowhere"),
        (["resume=/nowhere"], "/nowhere"),
        (["env=Catch", "run_name=../escape"], "run_name"),
        (["env=Catch", "wandb=maybe"], "wandb"),
        (["env=Catch", "device=tpu"], "device"),
    ],
)
def test_mistakes_are_one_line(words, expected, capsys, tmp_path):
    line = refused(capsys, *words, *([] if any(word.startswith("resume") for word in words) else [f"runs_dir={tmp_path}"]))
    assert expected in line
    assert not list(tmp_path.rglob("checkpoint"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the mistake is about")
def test_device_that_is_not_there(capsys):
    assert "CUDA" in refused(capsys, "env=Catch", "device=cuda")


def test_batch_beyond_memory_is_one_line(capsys, tmp_path):
    frames, small = tmp_path / "frames", ["agent.capacity=500", "agent.learning_starts_frames=16", "agent.update_frames=8"]
    assert launch.main(["job=collect", "env=Catch", "frames=320", f"data={frames}"]) == 0
    fit = ["job=fit", "model=nade", f"data={frames}", "fit.batch_size=1_000_000_000_000"]
    for words in (fit, ["env=Catch", "agent=dqn", *small, *SHORT, "agent.batch_size=100_000_000_000"]):
        assert words[-1].split("=")[0] in refused(capsys, *words, "wandb=off", f"runs_dir={tmp_path}")


def test_failures_that_are_not_of_memory_are_not_called_so():
    with pytest.raises(RuntimeError, match="contiguous"), within_memory("agent"):
        raise RuntimeError("Unsupported memory format: contiguous")


def test_capacity_beyond_memory_tells_the_bytes(capsys, tmp_path):
    line = refused(capsys, "env=Pong", "agent.capacity=1_000_000_000_000", "frames=200_000_000_000_000", f"runs_dir={tmp_path}")
    needed, free = (int(word.replace(",", "")) for word in line.split() if word.replace(",", "").isdigit())
    assert needed > 6 * 10**12 * 300
    assert 10**6 < free < 10**14
    assert not list(tmp_path.iterdir())


def test_capacity_that_the_budget_can_never_fill_is_fine(tmp_path):
    assert train(tmp_path, "agent.capacity=1_000_000_000_000") == 0


def test_help_explains_itself(capsys):
    assert launch.main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in (
        "agent=episodic_control",
        "resume=",
        "MontezumaRevenge",
        "Catch",
        "machado2018",
        "agent.key_frames",
        "frames_per_iteration",
    ):
        assert word in text


def test_help_lists_every_key_of_every_option(capsys):
    assert launch.main(["--help"]) == 0
    listed = set(re.findall(r"^  ([a-z][\w.]*):", capsys.readouterr().out, re.MULTILINE))
    for path in CONFIGS.rglob("*.yaml"):
        group = path.parent.name
        if group == "experiment":
            continue
        prefixes = {"job": [""], "configs": [""], "model": ["encoder.", "density.", "planner.", "simulator."]}.get(group, [f"{group}."])
        sections = {"evaluation", "fit", "collect", "judge", "play"}
        for key in parse_yaml(path.read_text()).keys() - {"defaults", "job", "game", "_target_", *sections}:
            assert any(f"{prefix}{key}" in listed for prefix in prefixes), f"{path}: {key}"
    assert {"fit.heldout", "fit.path", "evaluation.before", "data", "run", "play.port"} <= listed


def test_help_offers_models_for_what_they_can_do(capsys):
    assert launch.main(["--help"]) == 0
    lines = {
        line.split()[0]: line
        for line in re.sub(r"\n {12}", " ", capsys.readouterr().out).splitlines()  # long lists go on in the next line
        if line.startswith(("encoder ", "density ", "planner ", "simulator ", "model "))
    }
    for path in (CONFIGS / "model").glob("*.yaml"):
        node = parse_yaml(path.read_text())
        model = build(node, "model", obs_shape=(1, 84, 84), num_actions=2, device=torch.device("cpu"))
        for group, kind in {"encoder": Encoder, "density": Density, "planner": Planner, "simulator": Simulator, "model": Trainable}.items():
            assert isinstance(model, kind) == (f" {path.stem}," in lines[group].replace(" (", ", (")), f"{group}={path.stem}"


def test_run_folder_holds_what_it_should(tmp_path):
    assert train(tmp_path) == 0
    run = tmp_path / "run"
    for name in ("config.yaml", "version.json", "metrics.jsonl", "evaluation.csv", "checkpoint", "checkpoint.previous", "report.html"):
        assert (run / name).exists(), name
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["frames"] for row in rows] == list(range(64, 641, 64))
    assert {row["iteration"] for row in rows} == {1, 2}
    for row in rows:
        assert 0.99 < sum(value for name, value in row.items() if name.startswith("time/")) < 1.01


def test_budget_is_whole_iterations(tmp_path, capsys):
    assert train(tmp_path, "frames=400") == 0
    assert "frames=400 becomes 640" in capsys.readouterr().out


def test_existing_run_name_is_not_overwritten(tmp_path, capsys):
    assert train(tmp_path) == 0
    line = refused(capsys, "env=Catch", *SHORT, f"runs_dir={tmp_path}", "run_name=run")
    assert "resume=" in line


@pytest.mark.parametrize("name", ["josé (1)", "a=b", "with space"])
def test_folders_may_be_called_what_people_call_them(tmp_path, name):
    assert launch.main(["env=Catch", *SHORT, *SHORT_EVALUATION, f"runs_dir={tmp_path / name}", "run_name=run"]) == 0
    assert launch.main([f"resume={tmp_path / name / 'run'}", "frames=960"]) == 0


def test_numbers_may_be_typed_as_people_type_them():
    assert compose(["frames=2_000_000"]).frames == compose(["frames=2e6"]).frames == 2_000_000
    cfg = compose(["fit.updates=1e1", "seed=1e3", "evaluation.num_envs=4.0", "fit.learning_rate=1.0"])
    numbers = (cfg.fit.updates, cfg.seed, cfg.evaluation.num_envs)
    assert numbers == (10, 1000, 4)
    assert all(type(number) is int for number in numbers)


def test_knobs_that_are_whole_numbers_may_be_typed_as_floats(tmp_path):
    assert train(tmp_path, "agent.capacity=1e3", "encoder.features=8.0", "env.size=7e0", "frames=320") == 0


def test_every_atari_game_is_an_option():
    from envs.atari import GAMES

    assert len(GAMES) == 104
    for name in ("Pong", "MontezumaRevenge", "MsPacman", "Qbert"):
        assert compose([f"env={name}"]).env.game == name


def small_frames(words: list[str]) -> list[str]:
    return [*words, "frames=64", "frames_per_iteration=64", "num_envs=4", "wandb=off", *SHORT_EVALUATION, "evaluation.episodes_per_lane=1"]


ENVS = sorted(path.stem for path in (CONFIGS / "env").glob("*.yaml") if path.stem != "atari")
FIT = ["fit.frames=64", "fit.updates=2", "fit.batch_size=8"]


@pytest.mark.parametrize("env", ENVS)
def test_every_environment_runs_64_frames(env, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vizdoom", FakeViZDoom())
    monkeypatch.chdir(tmp_path)  # ViZDoom has a folder where it runs
    assert launch.main(small_frames([f"env={env}", f"runs_dir={tmp_path}"])) == 0


@pytest.mark.parametrize("agent", sorted(path.stem for path in (CONFIGS / "agent").glob("*.yaml")))
def test_every_agent_runs_64_frames(agent, tmp_path):
    assert launch.main(small_frames([f"agent={agent}", "env=Catch", f"runs_dir={tmp_path}"])) == 0


DENSITIES = ["cts", "hash_counts", "nade", "pixelcnn", "pixelcnn_large"]
PLANNERS = ["straw"]
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
SIMULATORS = [name for name in MODELS if name.startswith(("last_frame", "oh_", "small_", "state_space"))]
LEARN_SOON = ["agent.capacity=500", "agent.learning_starts_frames=16", "agent.update_frames=8"]


@pytest.mark.parametrize("agent", ["a3c_plus", "dqn"])
@pytest.mark.parametrize("density", DENSITIES)
def test_every_density_counts_for_64_frames(agent, density, tmp_path):
    words = [f"agent={agent}", f"density={density}", "env=Catch", f"runs_dir={tmp_path}", *(LEARN_SOON if agent == "dqn" else [])]
    if density == "pixelcnn_large":
        words += ["density.planes=4", "density.blocks=1"]
    assert launch.main(small_frames(words)) == 0


@pytest.mark.parametrize("agent", ["a3c", "a3c_plus"])
@pytest.mark.parametrize("planner", PLANNERS)
def test_every_planner_plans_for_64_frames(agent, planner, tmp_path):
    assert launch.main(small_frames([f"agent={agent}", f"planner={planner}", "env=Catch", f"runs_dir={tmp_path}"])) == 0
    row = json.loads(next(tmp_path.rglob("metrics.jsonl")).read_text().splitlines()[-1])
    assert 0 < row["train/replan_share"] <= 1 <= row["train/commitment_steps"]


@pytest.mark.parametrize("bonus", sorted(path.stem for path in (CONFIGS / "bonus").glob("*.yaml")))
def test_every_bonus_pays_for_64_frames(bonus, tmp_path):
    assert launch.main(small_frames(["agent=a3c_plus", f"bonus={bonus}", "env=Catch", f"runs_dir={tmp_path}"])) == 0


@pytest.mark.parametrize("model", [model for model in MODELS if model not in DENSITIES + PLANNERS + SIMULATORS])
def test_every_model_encodes_for_64_frames_and_2_updates(model, tmp_path):
    env = "Pong" if model.endswith("mfec") else "Catch"
    words = [f"encoder={model}", f"env={env}", f"runs_dir={tmp_path}", *FIT]
    if env == "Pong":
        words += ["evaluation.num_envs=1"]
        pytest.importorskip("ale_py")
    assert launch.main(small_frames(words) if env == "Catch" else [*small_frames(words), "env.num_threads=1"]) == 0


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml")))
def test_every_experiment_composes(experiment):
    assert compose([f"experiment={experiment}"]).choices.experiment == experiment


def test_plans_longer_than_memory_are_refused(tmp_path, capsys):
    words = [
        "agent=a3c",
        "planner=straw",
        "planner.plan_steps=10_000",
        "num_envs=4096",
        "agent.n_steps=100",
        "env=Catch",
        f"runs_dir={tmp_path}",
    ]
    told = refused(capsys, *words)
    assert "will grow to" in told
    assert "lower planner.plan_steps, agent.n_steps or num_envs" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bench", sorted(path.stem for path in (CONFIGS / "bench").glob("*.yaml")))
def test_every_line_of_every_bench_composes(bench, tmp_path):
    cfg = plain(compose(["job=bench", f"bench={bench}"]))["bench"]
    if "runs" in cfg:
        assert len(plan(cfg, tmp_path)) == len(cfg["seeds"]) * len(cfg["runs"]) * max(1, len(cfg.get("games") or []))


def test_salient_event_bench_makes_its_picture(tmp_path, capsys):
    words = ["job=bench", "bench=salient_event", "bench.phase_steps=40", "bench.probe_steps=40", "bench.density=hash_counts"]
    assert launch.main([*words, f"runs_dir={tmp_path}"]) == 0
    result = json.loads((tmp_path / "bench-salient_event" / "results.json").read_text())
    assert [row["walking"] for row in result["probes"]] == [False, True, False, True]
    assert (tmp_path / "bench-salient_event" / "event.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("bench.seed=-1", "bench.seed must be a whole number from 0 to 2^48, got -1"),
        ("bench.seed=x", "bench.seed must be a whole number"),
        ("bench.seed=null", "bench.seed must be a whole number"),
        ("bench.name=../../evil", "bench.name must be made of letters"),
        ("bench.density=vae", "bench.density=vae gives only a bound, and pseudo-counts need a density that is exact"),
        ("bench.density=ctss", "there is no density=ctss; the nearest are density=cts"),
        ("bench.env=Pong", "bench.env=Pong has no actions"),
    ],
)
def test_salient_event_refuses_by_name(tmp_path, capsys, word, expected):
    assert expected in refused(capsys, "job=bench", "bench=salient_event", "bench.phase_steps=1", f"runs_dir={tmp_path / 'runs'}", word)
    assert not list(tmp_path.rglob("*"))


def test_bench_makes_a_table_and_a_picture_and_goes_on_where_it_was(tmp_path, capsys):
    words = ["job=bench", "bench=demo", f"runs_dir={tmp_path}", "bench.seeds=[0,1]", 'bench.runs=[["env=Catch","frames=640"]]']
    common = 'bench.common=["frames_per_iteration=320","evaluation.num_envs=2","evaluation.video=false"]'
    assert launch.main([*words, common]) == 0
    folder = tmp_path / "bench-demo"
    (result,) = json.loads((folder / "results.json").read_text())
    assert result["seeds"] == 2
    assert result["frames"] == 640
    assert len(result["final_by_seed"]) == 2
    assert "| env=Catch frames=640 | 640 | 2 |" in (folder / "table.md").read_text()
    assert (folder / "curves.png").stat().st_size > 1000
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.jsonl")}
    assert launch.main([*words, common]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.jsonl")}


def test_start_is_quick_and_light():
    """What is rarely used is imported late."""
    late = ("wandb", "matplotlib", "faiss", "tensorboard", "imageio_ffmpeg")
    code = f"import sys, lab.train; print([name for name in {late} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_idle_threads_of_openmp_sleep_soon_unless_the_user_says_otherwise():
    """The word must be in the environment before torch is loaded."""
    code = "import os, sys, launch; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    for given, expected in (({}, "5000 False"), ({"GOMP_SPINCOUNT": "7"}, "7 False")):
        environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | given
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        assert out.strip() == expected
