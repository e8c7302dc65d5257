"""From the words of a command line to a configuration, and from a configuration to objects."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from envs.api import UserError
from lab.folder import CONFIGS, RESUMABLE_KEYS, as_word, find_folder, parse_yaml, read_config

WANDB_MODES = ("auto", "online", "offline", "off")
PATHS = ("runs_dir", "run_name", "data", "run", "fit.path", "env.level")
MOST = 2**48  # of any count
MOST_LANES = 65_536
NO_MEMORY = re.compile(r"allocate|out of memory|ALLOC_FAILED|overflow", re.IGNORECASE)  # as torch says it
OF_RUNS = ("frames", "frames_per_iteration", "checkpoint_frames", "num_envs", "seed", "run_name", "record_actions")
MODEL_JOBS = ("encoder", "density", "simulator", "planner")
OF_JOB: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "train": (("agent", "env", "evaluation"), RESUMABLE_KEYS),
    "fit": (("data",), ("device", "wandb", "fit.updates")),
}
"""Of what can be resumed: the keys that its configuration has, and those that may change."""
OF_WORLDS = ("agent", "inner", "env", "protocol", "experiment", "bonus", *MODEL_JOBS)


def compose(words: list[str], configs: Path = CONFIGS) -> DictConfig:
    """The configuration that the words (`key=value`) ask for. UserError, in one line, where a word is not understood."""
    for word in words:
        if not re.match(r"\+?[\w.]+=", word):
            raise UserError(f"'{word}' is not of the form key=value (python launch.py --help)")
        if word.startswith(("+", "hydra")):
            raise UserError(f"{word}: there is no such key to set (python launch.py --help lists the keys)")
    typed = dict(word.split("=", 1) for word in words)
    for group in ("job", "agent", "inner", "env", "model", "protocol", "bench", "bonus", *MODEL_JOBS):
        if (group in typed and not re.fullmatch(r"[A-Za-z]\w*", typed[group])) or typed.get(group) == "null":
            raise UserError(f"{group}={typed[group]} is no name; python launch.py --help lists the options")
    for key in OF_RUNS:
        if typed.get("job") == "bench" and key in typed:
            raise UserError(f"{key}={typed[key]} says nothing to a bench: its runs are told in bench.common, bench.runs and bench.seeds")
    if typed.get("job") in ("collect", "play") and typed.get("run", "null") != "null":
        own = "plays its own agent in its own world (collect.obs= shows it otherwise)" if typed["job"] == "collect" else "has its own world"
        for key in typed:
            if key.partition(".")[0] in OF_WORLDS:
                raise UserError(f"{key}={typed[key]}: run= {own}")
    if {"model", "simulator"} <= set(typed):
        raise UserError(f"model={typed['model']} simulator={typed['simulator']}: one fit, one model; leave one of them out")
    words = [_quoted(key, value) for key, value in typed.items()]
    if typed.get("resume", "null") != "null":
        return _resumed(typed)
    _register(configs)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(configs), version_base="1.3"):
            cfg = hydra_compose("config", overrides=words, return_hydra_config=True)
        choices = {str(group): choice for group, choice in cfg.hydra.runtime.choices.items() if not str(group).startswith("hydra/")}
        with open_dict(cfg):
            del cfg["hydra"]
            named = sorted(choices.items(), key=lambda item: "@" not in item[0])  # agent is what was chosen, not what is inner to it
            cfg["choices"] = {group.partition("@")[0]: choice for group, choice in named if choice is not None}
        OmegaConf.resolve(cfg)
    except (HydraException, OmegaConfBaseException, ValueError) as trouble:
        raise UserError(_one_line(trouble, configs, typed)) from trouble
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"job={cfg.job} needs {' and '.join(f'{key}=' for key in missing)}")
    check_numbers(cfg)
    return cfg


def _quoted(key: str, value: str) -> str:
    """A word whose value Hydra reads as it stands, where the value is a path, which may hold any character."""
    if key in PATHS and value not in ("", "null") and not value.startswith(("'", '"', "[", "{")):
        return f"{key}='{value}'" if "'" not in value else f'{key}="{value}"'
    return f"{key}={value}"


def _resumed(typed: dict[str, str]) -> DictConfig:
    """The configuration of the run that `resume` names, with what a resumed run may change, and nothing else, changed."""
    if typed.get("job", "train") not in OF_JOB:
        run = f" {as_word('run', typed['resume'])}" if typed["job"] in ("evaluate", "report") else ""
        raise UserError(f"resume= goes on with training or a fit and takes no other job; type job={typed['job']}{run} without resume=")
    folder = find_folder(typed["resume"], "resume")
    cfg = OmegaConf.create(read_config(folder))
    if cfg.get("job") not in OF_JOB:
        raise UserError(f"resume={folder}: that was job={cfg.get('job')}, and only training and fits go on (job=collect does so by itself)")
    if typed.get("job", cfg.job) != cfg.job:
        raise UserError(f"resume={folder}: that was job={cfg.job}, not job={typed['job']}; leave job= out")
    own, free = OF_JOB[str(cfg.job)]
    needed = {*OmegaConf.load(CONFIGS / "config.yaml"), *own, "fit", "choices"} - {"defaults"}
    lacking = sorted(key for key in needed if key not in cfg)
    if lacking:
        raise UserError(f"{folder}/config.yaml is damaged: it lacks {', '.join(lacking)}")
    for key, text in typed.items():
        if key in ("resume", "job"):
            continue
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as trouble:
            raise UserError(f"{key}={text} is not understood") from trouble
        old = OmegaConf.select(cfg, key)
        if value == old:
            continue
        if key not in free and key not in [f"evaluation.{name}" for name in cfg.get("evaluation", {})]:
            allowed = ", ".join((*free, "evaluation.*") if "evaluation" in cfg else free)
            raise UserError(f"{key} cannot be changed: a resumed run keeps its configuration but for {allowed}; start a new run instead")
        if key == "fit.updates" and cfg.fit.get("phases"):
            raise UserError(f"{key}={text} says nothing here: fit.phases tells how many updates there are")
        OmegaConf.update(cfg, key, value)
    cfg.resume = str(folder)
    check_numbers(cfg)
    return cfg


def _register(configs: Path) -> None:
    """Every model under the four job groups, every agent as an inner one and every Atari game as a world, without importing any of them."""
    from envs.atari import GAMES
    from envs.protocols import PROTOCOLS

    store = ConfigStore.instance()
    for path in sorted((configs / "model").glob("*.yaml")):
        for group in MODEL_JOBS:
            store.store(group=group, name=path.stem, node={"defaults": [{"/model@_here_": path.stem}, "_self_"]})
    for path in sorted((configs / "agent").glob("*.yaml")):
        if "/inner@" not in path.read_text(encoding="utf-8"):  # an agent that has an inner one is none itself
            store.store(group="inner", name=path.stem, node={"defaults": [{"/agent@_here_": path.stem}, "_self_"]})
    for name in GAMES:
        store.store(group="env", name=name, node={"defaults": ["atari", "_self_"], "game": name})
    for name in PROTOCOLS:
        store.store(group="protocol", name=name, node={"name": name})


def check_numbers(cfg: DictConfig) -> None:
    """UserError unless the door's own numbers are whole and positive and fit each other."""
    for key in ("frames", "frames_per_iteration", "checkpoint_frames", "num_envs", "log_frames"):
        value = cfg.get(key)
        if value is None and key == "checkpoint_frames":
            continue
        cfg[key] = value = _whole(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MOST:
            raise UserError(f"{key} must be a whole number above 0 and at most 2^48, got {value}")
    if cfg.num_envs > MOST_LANES:
        raise UserError(f"num_envs must be at most {MOST_LANES}, got {cfg.num_envs}")
    for key in ("runs_dir", "data", "run"):
        if (cfg.job, key) in (("collect", "run"), ("play", "run"), ("play", "data")) and cfg.get(key) is None:
            continue
        if key in cfg and (not isinstance(cfg[key], str) or not cfg[key].strip()):
            raise UserError(f"{key}= must name a folder, got {cfg[key]!r}")
    for key in ("tensorboard", "record_actions"):
        if not isinstance(cfg[key], bool):
            raise UserError(f"{key} must be true or false, got {cfg[key]}")
    cfg.seed = _whole(cfg.seed)
    check_seed("seed", cfg.seed)
    if cfg.checkpoint_frames and cfg.checkpoint_frames % cfg.frames_per_iteration:
        raise UserError(
            f"checkpoint_frames must be a multiple of frames_per_iteration = {cfg.frames_per_iteration}, got {cfg.checkpoint_frames}"
        )
    for section in ("evaluation", "fit", "collect"):
        if section in cfg and not isinstance(cfg[section], DictConfig):
            raise UserError(f"{section} is a group of keys ({section}.NAME=value), got {cfg[section]}")
        for key, value in cfg.get(section, {}).items():
            if key not in ("learning_rate", "heldout", "epsilon"):
                cfg[section][key] = value = _whole(value)
            _check_knob(f"{section}.{key}", str(key), value)
    if "wandb" in cfg and cfg.wandb not in (*WANDB_MODES, False):
        raise UserError(f"wandb must be one of {', '.join(WANDB_MODES)}, got {cfg.wandb}")


def check_seed(key: str, value: Any) -> None:
    """UserError unless the value of `key` is a seed."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST:
        raise UserError(f"{key} must be a whole number from 0 to 2^48, got {value}")


def _check_knob(name: str, key: str, value: Any) -> None:
    """UserError unless a knob of evaluation.* or fit.* is of its kind: true or false, a word, or a number above 0."""
    if key in ("before", "video"):
        _check_type(name, value, "bool")
    elif key == "heldout":
        _check_type(name, value, "float")
        if not 0 <= value < 1:
            raise UserError(f"{name} is a share of the frames, 0 or more and below 1, got {value}")
    elif key == "epsilon":
        _check_type(name, value, "float | None")
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{name} is a share of the actions, from 0 to 1, or null for the protocol's, got {value}")
    elif key == "warmup_updates" and value == 0:
        return
    elif key == "phases" or (key == "window_steps" and value is None):
        return  # job=fit reads them
    elif key in ("optimiser", "precision", "path", "obs"):
        _check_type(name, value, "str | None" if key in ("path", "obs") else "str")
    else:
        _check_type(name, value, "float" if key == "learning_rate" else "int")
        if not 0 < value < float("inf") or (key != "learning_rate" and value > MOST):
            raise UserError(f"{name} must be above 0 and at most 2^48, got {value}")
        if key == "num_envs" and value > MOST_LANES:
            raise UserError(f"{name} must be at most {MOST_LANES}, got {value}")


def _one_line(trouble: Exception, configs: Path, typed: dict[str, str]) -> str:
    text = " ".join(str(trouble).split())
    for key, value in typed.items():
        if "${" in value and (isinstance(trouble, OmegaConfBaseException) or isinstance(trouble.__cause__, GrammarParseError)):
            return f"{key}={value} is not understood: ${{NAME}} stands for the value of a key, and there is no such key; leave ${{ out"
    if isinstance(trouble, OverrideParseException):
        return f"{trouble.override} is not understood; a word is key=value, and what has spaces or brackets wants quotes"
    if isinstance(trouble, MissingConfigException) and trouble.options:
        group, _, word = (trouble.missing_cfg_file or "").rpartition("/")
        near = difflib.get_close_matches(word, trouble.options, n=3, cutoff=0.5)
        shown = ", ".join(f"{group}={option}" for option in near or sorted(trouble.options)[:12])
        shown += ", ..." if not near and len(trouble.options) > 12 else ""
        return f"there is no {group}={word}; {'the nearest are' if near else 'there are'} {shown} (all: python launch.py --help)"
    missing = re.search(r"Could not find '([\w./-]+)/([\w.-]+)'", text)
    if missing:
        return f"there is no {missing.group(1)}={missing.group(2)} (python launch.py --help lists them)"
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if unknown:
        key = unknown.group(1)
        if key in (*MODEL_JOBS, "bonus", "protocol", "model", "agent", "inner", "env", "bench"):
            if key not in typed and "experiment" in typed:
                why = "which only Atari has" if key == "protocol" else "which this job, agent or environment does not take"
                return f"experiment={typed['experiment']} chooses {key}=, {why}; choose another experiment or leave it out"
            return f"there is nothing to choose with {key}= here: this job, agent or environment takes none"
        return f"there is no key {key} here; {_near_keys(key, configs)}python launch.py --help lists the keys"
    return text


def _near_keys(key: str, configs: Path) -> str:
    keys = list(OmegaConf.load(configs / "config.yaml"))
    near = difflib.get_close_matches(key, [str(name) for name in keys], n=2)
    return f"did you mean {' or '.join(near)}? " if near else ""


def build(node: Any, what: str, **given: Any) -> Any:
    """Calls the `_target_` of a configuration node with the node's other keys as keywords, and what is `given`.

    The constructor is the schema: an unknown key, or a value of another type than the constructor's annotation, is a
    UserError that names it.

    Args:
        node: a mapping with `_target_`.
        what: its name in messages, such as "agent".
    """
    knobs = {str(key): value for key, value in node.items() if key != "_target_"}
    target = _target(node, what)
    parameters = inspect.signature(target).parameters
    for key, value in knobs.items():
        if key not in parameters or key in given:
            raise UserError(f"{what} takes no {what}.{key}; it takes {', '.join(k for k in parameters if k not in given)}")
        knobs[key] = _whole(value, str(parameters[key].annotation))
        _check_type(f"{what}.{key}", knobs[key], str(parameters[key].annotation))
    with within_memory(what, f"; lower what is large of {what}.*"):
        return target(**knobs, **{key: value for key, value in given.items() if key in parameters})


@contextmanager
def within_memory(what: str, advice: str = "") -> Iterator[None]:
    """Makes one line, a UserError, of an allocation that fails, or of a size that no allocation can have."""
    try:
        yield
    except (MemoryError, RuntimeError, TypeError) as trouble:
        text = " ".join(str(trouble).split())
        if not isinstance(trouble, MemoryError) and not NO_MEMORY.search(text):
            raise
        raise UserError(f"{what} does not fit into memory{advice}: {text[:200]}") from trouble


def constructor_keys(node: Any, what: str) -> tuple[str, ...]:
    """The keywords that the class of a configuration node takes."""
    return tuple(inspect.signature(_target(node, what)).parameters)


def _target(node: Any, what: str) -> Any:
    module, _, name = str(node.get("_target_", "")).rpartition(".")
    if not module:
        raise UserError(f"{what} has no _target_ (a file under configs/{what}/ names its class there)")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as trouble:
        raise UserError(f"{what}: {module}.{name} is not to be found ({trouble})") from trouble


def _whole(value: Any, annotation: str = "int") -> Any:
    """The value, 1e6 as 1_000_000 where a whole number is asked for."""
    asked = {kind.strip() for kind in annotation.split("|")}
    return int(value) if isinstance(value, float) and value.is_integer() and "int" in asked and "float" not in asked else value


def _check_type(key: str, value: Any, annotation: str) -> None:
    fits = {
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": isinstance(value, (int, float)) and not isinstance(value, bool),
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
    }
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}
    kinds = [kind.strip() for kind in annotation.split("|")]
    if value is None and "None" in kinds:
        return
    known = [kind for kind in kinds if kind in fits]
    if known and not any(fits[kind] for kind in known):
        raise UserError(f"{key} must be {' or '.join(words[kind] for kind in known)}, got {value!r}")
    if fits["int"] and abs(value) > MOST:
        raise UserError(f"{key} must be at most 2^48, got {value}")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as nested dicts, lists, numbers and strings."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
