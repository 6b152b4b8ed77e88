"""What a measurement must say of its circumstances to be worth keeping."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from rwkv_train import __version__
from rwkv_train.ops.chip import chip_name

_CHECKOUT = Path(__file__).resolve().parents[2]


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return device, versions, commit and command of this process as JSON's types.

    Args:
        device: where the measurement ran.
    """
    return {
        "device": chip_name(device),
        "threads": torch.get_num_threads(),
        "rwkv_train": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": " ".join(["rwkv-train", *sys.argv[1:]]),
    }


def _commit() -> str | None:
    """The commit of this checkout, with "+" after it if files were changed since; None outside of one."""
    try:
        told = subprocess.run(
            ["git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()
