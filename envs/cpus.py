"""How many processors this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cpus(root: Path = Path("/")) -> int:
    """Processors that this process may use, at least 1: the smallest of its affinity mask and the CPU quotas of its control groups (Linux,
    v1 and v2), a part of a processor rounded up. `root` holds proc/ and sys/."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cpus = os.cpu_count() or 1
    quotas = _quotas(root)
    return max(1, min([cpus, *(-int(-quota // 1) for quota in quotas)]))


def _quotas(root: Path) -> list[float]:
    """CPU quotas in processors, of this process's control groups and of all those above them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    quotas = []
    for line in lines:
        controllers, group = line.split(":", 2)[1:]
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        folder = mount / group.strip("/")
        for level in (folder, *folder.parents):
            if not level.is_relative_to(mount):
                break
            quota = _unified_quota(level) if not controllers else _legacy_quota(level)
            if quota is not None:
                quotas.append(quota)
    return quotas


def _unified_quota(folder: Path) -> float | None:
    try:
        limit, period = (folder / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def _legacy_quota(folder: Path) -> float | None:
    try:
        limit = int((folder / "cpu.cfs_quota_us").read_text())
        return None if limit <= 0 else limit / int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
