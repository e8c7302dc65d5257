"""job=play of run folders: fitted simulators, trained agents, and what does not fit together."""

import json
import shutil
from itertools import islice

import pytest
import torch
from playing import settings

import launch
from agents.loop import watch
from envs.api import UserError
from lab import checkpoint
from lab.play_picture import unpack
from lab.play_session import Session
from lab.play_stage import make_stage
from lab.run import derive_seed, make_env

COLLECT = ["job=collect", "num_envs=2", "frames=80"]
FIT = [
    "job=fit",
    "simulator=small_feedforward",
    "wandb=off",
    "fit.updates=1",
    "fit.batch_size=2",
    "fit.checkpoint_updates=1",
    "fit.heldout=0",
]
TRAIN = ["frames=80", "frames_per_iteration=80", "num_envs=2", "wandb=off", "evaluation.num_envs=1", "evaluation.video=false"]
ROUND = ["agent.first_updates=1", "agent.batch_size=2", "agent.dreams=1", "agent.dream_envs=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Of Catch and of Pong: clips, a fit to them, and an agent, which sees Pong otherwise than its simulator."""
    place = tmp_path_factory.mktemp("play")
    pong = ["env=Pong", "num_envs=1", "frames=56"]
    for name, words in {"small": ["env=Catch", "env.size=5"], "large": ["env=Catch"], "pong": [*pong, "env.obs=rgb64"]}.items():
        collect = {word.split("=")[0]: word for word in (*COLLECT, *words)}
        assert launch.main([*collect.values(), f"data={place / name}"]) == 0
        if name != "large":
            assert launch.main([*FIT, f"data={place / name}", f"runs_dir={place}", f"run_name=fit_{name}"]) == 0
    again = shutil.copytree(place / "fit_small", place / "fit_large") / "config.yaml"
    again.write_text(again.read_text().replace(str(place / "small"), str(place / "large")))
    shutil.copytree(place / "fit_small", place / "fit_again")
    catch = ["env=Catch", "env.size=5"]
    agents = {
        "small": [*catch, "agent=dqn"],
        "pong": [*pong, "agent=random", "evaluation.epsilon=0.25"],
        "dreamer": [*catch, "agent=dreamer", "agent.learning_starts_frames=40", "agent.train_frames=80", *ROUND],
    }
    for name, words in agents.items():
        train = {word.split("=")[0]: word for word in (*TRAIN, *words)}
        assert launch.main([*train.values(), f"runs_dir={place}", f"run_name=agent_{name}"]) == 0
    return place


def of(place, run, *against, data=None):
    told = {"run": str(place / run), "against": [str(place / one) for one in against], "data": data and str(place / data)}
    return make_stage({**settings("env=Pong"), "device": "cpu", **told})


def test_a_fit_brings_its_world_and_its_rivals(place):
    on = of(place, "fit_small", "fit_again")
    assert on.kind.name == "Catch"
    assert on.kind.specs[0].obs_shape == (1, 5, 5)
    assert on.player is None
    labels = [offer.label for offer in on.offers]
    assert labels == ["small_feedforward (fit_small)", "small_feedforward (fit_again)"]
    session = Session(on, 0)
    for _ in range(4):
        session.advance()
    facts, pictures = unpack(session.show())
    assert facts["simulator"]["ahead"] == 1  # four frames are known before the first prediction
    assert not on.offers[0].simulator.training
    weights = checkpoint.load(place / "fit_small").state["model"]
    assert all(torch.equal(value, weights[name]) for name, value in on.offers[0].simulator.state_dict().items())
    assert len(pictures["simulated"]) == 25


def test_clips_that_moved_are_found_by_data(place, tmp_path):
    shutil.copytree(place / "fit_small", tmp_path / "fit")
    text = (tmp_path / "fit" / "config.yaml").read_text()
    (tmp_path / "fit" / "config.yaml").write_text(text.replace(str(place / "small"), str(place / "gone")))
    with pytest.raises(UserError, match=r"was fitted to .*gone, which is not there; data=FOLDER"):
        of(tmp_path, "fit")
    told = {"run": str(tmp_path / "fit"), "against": [], "data": str(place / "small")}
    assert make_stage({**settings("env=Pong"), "device": "cpu", **told}).kind.name == "Catch"


def test_an_agent_does_what_it_does_when_it_is_watched(place):
    on = of(place, "agent_small", "fit_small")
    assert (on.player.label, on.player.view, on.player.epsilon) == ("dqn", 0, 0.0)
    assert len(on.kind.specs) == 1  # the simulator sees what the agent sees
    assert [offer.label for offer in on.offers] == ["small_feedforward"]
    env = make_env(on.kind.views[0], 1, torch.device("cpu"))
    for seed in range(5):
        session = Session(on, seed)
        for tick in islice(watch(env, on.player.agent, derive_seed(seed, 1, "play")), 4):
            assert torch.equal(session.seen.obs[0], tick.step.obs)
            session.advance()
            assert unpack(session.show())[0]["action"] == int(tick.decision.action)
        assert session.seen.last


def test_a_simulator_of_the_agents_own_is_on_offer(place):
    on = of(place, "agent_dreamer", "fit_small")
    assert [offer.label for offer in on.offers] == ["small_feedforward (its own)", "small_feedforward"]
    own = on.offers[0].simulator
    assert own is on.player.agent.simulator
    weights = checkpoint.load(place / "agent_dreamer").state["agent"]["simulator"]
    assert all(torch.equal(value, weights[name]) for name, value in own.state_dict().items())
    session = Session(on, 0)
    for _ in range(4):
        session.advance()
    assert unpack(session.show())[0]["simulator"]["ahead"] == 1


def test_agent_and_simulator_may_see_one_game_otherwise(place):
    on = of(place, "agent_pong", "fit_pong")
    assert [spec.obs_shape for spec in on.kind.specs] == [(1, 84, 84), (3, 64, 64)]
    assert (on.player.view, on.offers[0].view, on.player.epsilon) == (0, 1, 0.25)
    session = Session(on, 0)
    for _ in range(6):
        session.advance()
    facts, _ = unpack(session.show())
    assert [(picture["name"], picture["height"], picture["channels"]) for picture in facts["pictures"]] == [
        ("truth", 64, 3),
        ("simulated", 64, 3),
        ("screen", 210, 3),
    ]
    assert facts["simulator"]["ahead"] == 3
    assert facts["watching"]
    session.close()


def test_what_does_not_fit_together_is_refused_by_name(place, tmp_path):
    for runs, why in (
        (("fit_small", "fit_large"), r"different worlds, env.size is 5 in one, 7 in another"),
        (("fit_small", "fit_pong"), "Catch and Pong are different worlds"),
        (("agent_small", "fit_pong"), "Catch and Pong are different worlds"),
        (("fit_small", "agent_small"), "that was job=train; a simulator comes from job=fit"),
    ):
        with pytest.raises(UserError, match=why):
            of(place, *runs)
    with pytest.raises(UserError, match=r"simulates pictures of \(1, 5, 5\) under 3 actions, and its world has pictures of \(1, 7, 7\)"):
        of(place, "fit_small", data="large")
    shutil.copytree(place / "small", tmp_path / "clips")
    manifest = json.loads((tmp_path / "clips" / "manifest.json").read_text())
    manifest["source"]["world"]["_target_"] = "os.system"
    (tmp_path / "clips" / "manifest.json").write_text(json.dumps(manifest))
    told = {"run": str(place / "fit_small"), "against": [], "data": str(tmp_path / "clips")}
    with pytest.raises(UserError, match="does not say which world it was recorded in; collect clips anew"):
        make_stage({**settings("env=Pong"), "device": "cpu", **told})


def test_a_lost_life_may_be_an_end_to_a_simulator_of_such_a_protocol(place, monkeypatch):
    assert not of(place, "fit_pong").offers[0].lives_end
    path = place / "pong" / "manifest.json"
    before = path.read_text()
    monkeypatch.setattr("lab.play_stage.read_manifest", lambda folder: _with_protocol(json.loads(before), "atari100k"))
    assert of(place, "fit_pong").offers[0].lives_end


def _with_protocol(manifest, name):
    manifest["source"]["protocol"] = name
    return manifest
