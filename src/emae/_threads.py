"""How many threads to compute with: the CPU budget, not the number of cores of the machine."""

import math
import os
from pathlib import Path


def cpu_budget(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Threads this process may use: EMAE_THREADS, else OMP_NUM_THREADS, else its cores within its cgroup's quota."""
    for name in ("EMAE_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(name, "")
        if text.isdigit() and int(text) > 0:
            return int(text)
        if text and name == "EMAE_THREADS":
            raise ValueError(f"EMAE_THREADS={text!r}: want a whole number of threads, 1 or more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return max(1, cores if quota == math.inf else min(cores, math.ceil(quota)))


def limit_threads() -> int:
    """Keep torch and the other numeric libraries within `cpu_budget`; to be called before they are loaded."""
    threads = cpu_budget()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    return threads


def _quota(root: Path) -> float:
    """CPUs the cgroup of this process allows (v2, else v1); infinity without a limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return math.inf
    return math.inf if quota.startswith(("max", "-")) else int(quota) / int(period)
