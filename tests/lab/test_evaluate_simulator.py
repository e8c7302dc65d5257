"""job=evaluate_simulator, whole: what it writes, on which clips, and what it refuses."""

import csv
import json
import shutil

import pytest
import torch

import launch
from generative.clips import ClipData
from generative.last_frame import LastFrame
from lab import checkpoint
from lab.simulator_figures import picture_errors

SMALL = ["judge.horizon=5", "judge.clips=20", "judge.event_clips=100", "judge.moments=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Clips of Catch, two simulators fitted to them for a moment, and an agent."""
    place = tmp_path_factory.mktemp("evaluate")
    collect = ["job=collect", "env=Catch", "env.size=5", "num_envs=4", "frames=800", "frames_per_iteration=200"]
    assert launch.main([*collect, f"data={place / 'clips'}"]) == 0
    assert launch.main([*collect, "seed=1", f"data={place / 'others'}"]) == 0
    fit = [
        "job=fit",
        f"data={place / 'clips'}",
        f"runs_dir={place}",
        "wandb=off",
        "fit.updates=4",
        "fit.batch_size=4",
        "fit.checkpoint_updates=2",
    ]
    for name, words in {"acting": [], "deaf": ["simulator=small_no_action", "fit.heldout=0.3"], "all": ["fit.heldout=0"]}.items():
        assert launch.main([*fit, "simulator=small_feedforward", *words, f"run_name={name}"]) == 0
    train = [
        "agent=a3c",
        "env=Catch",
        "env.size=5",
        "agent.stack_frames=1",
        "frames=400",
        "frames_per_iteration=400",
        "num_envs=4",
        "wandb=off",
    ]
    assert launch.main([*train, "evaluation.video=false", f"runs_dir={place}", "run_name=agent"]) == 0
    return place


def judge(place, run, *words):
    assert launch.main(["job=evaluate_simulator", f"run={place / run}", f"data={place / 'clips'}", *SMALL, *words]) == 0
    folder = place / run / "evaluations" / "simulator-seed-0"
    return folder, json.loads((folder / "results.json").read_text())


def test_everything_is_written_and_can_be_compared(place, capsys):
    control = [f"judge.control_run={place / 'agent'}", "judge.control_every=[1,3]", "judge.control_steps=8", "judge.control_envs=3"]
    folder, found = judge(place, "acting", f"against=[{place / 'deaf'}]", *control)
    names = ["small_feedforward", "small_no_action", "last_frame"]
    assert list(found["results"]) == names
    for result in found["results"].values():
        assert [len(values) for values in result["errors"].values()] == [5] * 4
        assert set(result["control"]) == {"1", "3", "random"}
        assert all(len(played["returns"]) == 3 for played in result["control"].values())
        assert result["steps_per_second"] > 1
    assert len({json.dumps(result["control"]["1"]) for result in found["results"].values()}) == 1  # the live world
    assert found["results"]["small_no_action"]["counterfactuals"]["recall"] == 0.0
    data = ClipData(place / "clips").split(0.1)[1]  # what both have not seen
    expected = picture_errors(LastFrame(data.obs_shape, 3, torch.device("cpu")), data, 4, 5, 20)
    assert found["results"]["last_frame"]["errors"] == expected
    rows = list(csv.DictReader((folder / "errors.csv").open()))
    assert [row["simulator"] for row in rows] == [name for name in names for _ in range(5)]
    assert [float(row["psnr"]) if row["psnr"] else None for row in rows[-5:]] == [*map(pytest.approx, expected["psnr"][:4]), None]
    page = (folder / "report.html").read_text()
    assert page.count("<video") == 3
    assert "http" not in page.replace("http-equiv", "")
    assert all(name in page for name in names)
    assert "PSNR     small_feedforward" in capsys.readouterr().out


def test_the_same_evaluation_gives_the_same_figures(place):
    results = []
    for _ in range(2):
        _, found = judge(place, "acting")
        for result in found["results"].values():
            del result["steps_per_second"]
        results.append(found)
    assert results[0] == results[1]


def test_clips_of_another_folder_are_judged_as_a_whole_and_seen_ones_are_called_so(place, capsys):
    _, found = judge(place, "acting", f"data={place / 'others'}")
    assert found["settings"]["frames"] == 800
    _, found = judge(place, "all")
    assert found["settings"]["frames"] == 800
    assert "its figures are on what it has seen" in capsys.readouterr().out


def test_of_a_folder_that_has_grown_only_what_came_later_is_unseen(place, tmp_path):
    shutil.copytree(place / "clips", tmp_path / "clips")
    more = [
        "job=collect",
        "env=Catch",
        "env.size=5",
        "num_envs=4",
        "frames=1_200",
        "frames_per_iteration=200",
        f"data={tmp_path / 'clips'}",
    ]
    assert launch.main(more) == 0
    for run in ("acting", "all"):
        _, found = judge(place, run, f"data={tmp_path / 'clips'}")
        assert found["settings"]["frames"] == 400
    kept = ClipData(tmp_path / "clips").split(1 / 3)[1].ranges
    assert [(part.part, part.start, part.stop) for part in kept] == [(4, 0, 50), (5, 0, 50)]


def test_a_damaged_part_is_named_and_left_out(place, tmp_path, capsys):
    shutil.copytree(place / "clips", tmp_path / "clips")
    (tmp_path / "clips" / "clips-00001.zst").write_bytes(b"")
    _, found = judge(place, "acting", f"data={tmp_path / 'clips'}")
    printed = capsys.readouterr().out
    assert "clips-00001.zst is damaged (0 bytes" in printed
    assert "it is left out" in printed
    assert "its figures are on what it has seen" in printed  # which of the rest was held out is not certain any more
    assert found["settings"]["frames"] == 600


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run=nowhere"], "no such folder"),
        (["run={place}/agent"], "a simulator comes from job=fit"),
        (["data={place}/nowhere"], "no folder"),
        (["against=3"], "against is a list"),
        (["against=[{place}/agent]"], "a simulator comes from job=fit"),
        (["judge=3"], "judge"),
        (["judge.horizon=0"], "judge.horizon must be a whole number above 0"),
        (["judge.clips=1.5"], "judge.clips"),
        (["judge.moments=-1"], "judge.moments must be a whole number of 0 or more"),
        (["judge.control_every=[]"], "judge.control_every"),
        (["judge.control_every=[0]"], "judge.control_every"),
        (["judge.control_run={place}/acting"], "only a trained agent"),
        (["judge.speed=1"], "no key"),
    ],
)
def test_mistakes_are_one_line(place, capsys, words, expected):
    told = {"run": f"run={place / 'acting'}", "data": f"data={place / 'clips'}"}
    told |= {word.split("=")[0]: word.format(place=place) for word in words}
    assert launch.main(["job=evaluate_simulator", *told.values()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_a_checkpoint_that_does_not_say_what_it_was_fitted_to_is_refused(place, capsys, tmp_path):
    shutil.copytree(place / "acting", tmp_path / "acting")
    state = checkpoint.load(tmp_path / "acting").state
    del state["parts"]
    checkpoint.save(tmp_path / "acting", state)
    assert launch.main(["job=evaluate_simulator", f"run={tmp_path / 'acting'}", f"data={place / 'clips'}"]) == 2
    assert "does not say what it was fitted to" in capsys.readouterr().err


def test_pictures_of_another_size_are_refused_with_both(place, capsys, tmp_path):
    other = tmp_path / "clips"
    assert launch.main(["job=collect", "env=Catch", "env.size=6", "num_envs=4", "frames=80", f"data={other}"]) == 0
    assert launch.main(["job=evaluate_simulator", f"run={place / 'acting'}", f"data={other}"]) == 2
    line = capsys.readouterr().err
    assert "(1, 5, 5)" in line
    assert "(1, 6, 6)" in line


def test_a_strangers_manifest_names_no_code_that_is_not_ours(place, capsys, tmp_path):
    shutil.copytree(place / "clips", tmp_path / "clips")
    path = tmp_path / "clips" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["source"]["world"]["_target_"] = "os.system"
    path.write_text(json.dumps(manifest))
    words = ["job=evaluate_simulator", f"run={place / 'acting'}", f"data={tmp_path / 'clips'}"]
    assert launch.main(words) == 2
    assert "does not say which world" in capsys.readouterr().err
    assert launch.main([*words, *SMALL, "judge.moments=0"]) == 0
