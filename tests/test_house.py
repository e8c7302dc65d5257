"""The rules of the house: which room may import which, how long a file may be, what no file is called."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("envs", "generative", "agents", "lab")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))] + [ROOT / "launch.py"]
LONGEST = 400


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere in it, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in MODULES}
    return names


def allowed(room: str, target: str) -> bool:
    home = target.split(".")[0]
    if home not in ROOMS and home != "launch":
        return True
    return {
        "envs": home == "envs",
        "generative": home == "generative" or target in ("envs.api", "envs"),
        "agents": home == "agents"
        or target in ("envs.api", "envs", "generative", "generative.api", "generative.pseudo_count", "generative.dream", "generative.fit"),
        "lab": home != "launch",
        "launch.py": home != "launch",
    }[room]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_arrows_only_run_to_the_right(path):
    room = path.relative_to(ROOT).parts[0]
    wrong = [name for name in imports(path) if not allowed(room, name)]
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_no_circles():
    graph = {module_of(path): {name for name in imports(path) if name in MODULES} for path in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import circle: {' -> '.join((*trail, module))}"
        if module not in done:
            for target in graph[module]:
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def defines(path: Path, method: str) -> bool:
    return any(
        isinstance(node, ast.ClassDef) and any(isinstance(item, ast.FunctionDef) and item.name == method for item in node.body)
        for node in ast.parse(path.read_text()).body
    )


@pytest.mark.parametrize(("room", "method"), [("agents", "act"), ("generative", "encode")])
def test_no_agent_imports_another_agent_and_no_model_another_model(room, method):
    peers = {module_of(path) for path in (ROOT / room).glob("*.py") if defines(path, method)} - {f"{room}.api"}
    assert len(peers) >= 2
    for path in (ROOT / room).glob("*.py"):
        if module_of(path) in peers:
            assert not (imports(path) & peers) - {module_of(path)}, path


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("hydra", ("lab", "launch.py")),
        ("omegaconf", ("lab", "launch.py")),
        ("wandb", ("lab", "launch.py")),
        ("ale_py", ("envs/atari.py",)),
        ("envpool", ("envs/atari_envpool.py",)),
        ("vizdoom", ("envs/doom.py",)),
        ("websockets", ("lab/play_server.py",)),
    ],
)
def test_libraries_stay_in_their_rooms(library, homes):
    for path in FILES:
        place = path.relative_to(ROOT).as_posix()
        if any(name.split(".")[0] == library for name in imports(path)):
            assert place.startswith(homes), f"{place} imports {library}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_holds_one_idea(path):
    assert len(path.read_text().splitlines()) <= LONGEST
    assert path.stem not in ("utils", "common", "misc", "helpers", "registry", "callbacks")


def test_the_door_is_thin():
    assert len((ROOT / "launch.py").read_text().splitlines()) < 100
