"""The YAMLs of worlds spell the constructors' keywords and defaults, all of them and nothing else."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import OmegaConf

FOLDER = Path(__file__).parents[2] / "configs" / "env"
GIVEN_BY_THE_JOB = {"num_envs", "device", "protocol"}


@pytest.mark.parametrize("name", ["atari", "Chain", "Ring", "Catch", "Cue", "Deceptive", "GridMaze", "MyWayHome"])
def test_yaml_equals_constructor(name):
    knobs = OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"))
    module, cls = knobs.pop("_target_").rsplit(".", 1)
    parameters = inspect.signature(getattr(import_module(module), cls)).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items() if key not in GIVEN_BY_THE_JOB}
    if name == "atari":
        assert knobs.pop("game") == "???"
        knobs.pop("defaults", None)  # which protocol is the usual one
        assert knobs.pop("backend") == "ale"  # read by lab.run.make_env
        assert defaults.pop("game") is inspect.Parameter.empty
    else:
        assert cls == name
    assert knobs == defaults
