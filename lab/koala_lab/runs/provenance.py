"""Where a number was made: device, kernels, threads, versions, commit.

The same run can end with other bits on another kind of CPU: torch chooses its kernels by what the CPU can do.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from koala_lab import paths


def provenance(device: torch.device | str) -> dict[str, Any]:
    """Return what the provenance of every result holds, JSON-able.

    Args:
        device: The device of the run.

    Returns:
        ``device`` (its kind and name), ``kernels`` (the instruction set of torch's CPU kernels, which
        ``ATEN_CPU_CAPABILITY`` can lower), ``threads``, ``versions`` and ``commit``.
    """
    return {
        "device": f"{torch.device(device).type} ({device_name(device)})",
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": _commit(),
    }


def device_name(device: torch.device | str) -> str:
    """Return the model of a GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor()


@cache
def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", listing.read_text()) if listing.exists() else None
    return name[1] if name else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions that a run's numbers depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("koala-lib", "numpy", "pytorch_optimizer"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@cache
def _commit() -> str:
    """Return the commit of the working tree, with ``+`` if the code was changed; empty outside a checkout."""

    def git(*words: str) -> str:
        call = ["git", "-C", str(paths.ROOT), *words]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != paths.ROOT.resolve():
            return ""  # files of a tarball, unpacked inside somebody's repository
        dirty = git("status", "--porcelain", "koala_lib", "lab")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
