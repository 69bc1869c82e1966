"""What measured figures depend on."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch


def environment(*packages: str) -> dict[str, Any]:
    """The date, the versions of peftfn, torch and other packages, and the machine. No names of hosts, no paths."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **{package: version(package) for package in ("peftfn", "torch", *packages)},
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
    }
