"""What is to be known about a run besides its records: versions, hardware, commit, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "lightning-robust",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "torchmetrics",
    "textattack",
)


def run_info(**extra: Any) -> dict[str, Any]:
    """Return the contents of a ``run.json``: what a reader needs to judge or repeat the run.

    Nothing is imported for it and it never fails; what cannot be found is ``None`` or left out.

    Args:
        extra: Further entries such as ``run_id``, ``recipe``, ``backbone``, ``defenses`` and ``seed``.
    """
    return {
        **extra,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "versions": versions(),
        "hardware": hardware(),
        "git": git_commit(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that shape results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if "lightning-robust" not in found:
        # Run from a source tree that is not installed.
        from lightning_robust import __version__

        found["lightning-robust"] = __version__
    return found


def hardware() -> dict[str, Any]:
    """Return the processor's model, the cores this process may use, and the names of the GPUs."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Asking the driver and not torch: torch would initialise CUDA, after which no process may fork.
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or ""
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": usable,
        "gpus": [line.strip() for line in gpus.splitlines() if line.strip()],
    }


def git_commit() -> dict[str, Any] | None:
    """Return the commit of the current folder and whether files differ from it; ``None`` outside git."""
    commit = _output("git", "rev-parse", "HEAD")
    if not commit:
        return None
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if changes is None else bool(changes)}


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or None


def _output(*command: str) -> str | None:
    """Return what a command prints; ``None`` where it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=5, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace").strip()
