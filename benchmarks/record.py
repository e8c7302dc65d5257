"""What a benchmark found, as JSON: the figures, and what they were found on."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from envs.cpus import usable_cpus

OWN_PATHS = dict.fromkeys(("--sb3-python", "--rival-python"), "/path/to/venv/bin/python")  # of one machine, no matter to others

LOAD = os.getloadavg()[0]
"""Processes that wanted to run when the benchmark began."""


def record(
    path: Path | None,
    name: str,
    argv: Sequence[str] | None,
    rows: Any,
    packages: Sequence[str] = ("torch", "ale-py", "numba"),
    **facts: Any,
) -> None:
    """Writes a file of `rows` and `facts`, with command, machine and versions; nothing without a path.

    Args:
        path: of the file; folders are made.
        name: of the script in benchmarks/.
        argv: its words, None for those of the command line.
        packages: whose versions are told, beside Python's.
    """
    if path is None:
        return
    words = list(sys.argv[1:] if argv is None else argv)
    for option, shown in OWN_PATHS.items():
        if option in words[:-1]:
            words[words.index(option) + 1] = shown
    found = {
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *words]),
        "processor": platform.processor() or platform.machine(),
        "usable_cpus": usable_cpus(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": LOAD,
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        **facts,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
