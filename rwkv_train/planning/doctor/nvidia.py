"""NVIDIA's driver and its chips, without torch: what the driver's library, ``nvidia-smi`` and the PCI bus say."""

import subprocess
from pathlib import Path
from typing import NamedTuple

from rwkv_train.ops.cuda_driver import Driver
from rwkv_train.planning.doctor.finding import Finding, Status, gib, split_remedy

PCI_DEVICES = Path("/sys/bus/pci/devices")

PATIENCE_SECONDS = 30.0
"""``nvidia-smi`` takes a second or two; it waits without end for a chip that has hung."""

_NVIDIA = "0x10de"
_DISPLAY_CLASS = "0x03"
_FIELDS = ("driver_version", "name", "memory.total", "compute_cap")
_MIB = 2**20


class SmiChip(NamedTuple):
    """A GPU as ``nvidia-smi`` lists it."""

    name: str
    memory_bytes: int | None
    """``None`` for memory that chip and processor share."""
    capability: str | None
    """``"9.0"``; ``None`` where the driver is too old to tell."""


class Smi(NamedTuple):
    """What ``nvidia-smi`` says."""

    driver_version: str | None
    """``"580.65.06"``."""
    chips: tuple[SmiChip, ...]
    """All of the machine, whatever ``CUDA_VISIBLE_DEVICES`` leaves of them."""
    problem: str | None
    """What it says instead of listing chips; ``None`` where it is not installed, or works."""


def ask_smi(program: str | None, *, patience_seconds: float = PATIENCE_SECONDS) -> Smi:
    """Ask ``nvidia-smi`` for the driver's version and all chips.

    Args:
        program: its path; ``None`` where there is none.
        patience_seconds: how long it may take.
    """
    if program is None:
        return Smi(None, (), None)
    # Drivers before 2021 do not know the last field, and then tell nothing at all.
    for fields in (_FIELDS, _FIELDS[:-1]):
        command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=patience_seconds,
            )
        except subprocess.TimeoutExpired:
            return Smi(None, (), f"nvidia-smi did not answer within {patience_seconds:.0f} seconds")
        except OSError as error:
            return Smi(None, (), f"nvidia-smi at {program} cannot be started ({error.strerror or error})")
        if done.returncode == 0:
            rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
            rows = [row for row in rows if len(row) == len(fields)]
            return Smi(rows[0][0] if rows else None, tuple(map(_chip, rows)), None)
    said = " ".join((done.stdout + done.stderr).split())
    if "No devices were found" in said:
        return Smi(None, (), None)
    return Smi(None, (), f"nvidia-smi fails: {said[:400] or f'exit code {done.returncode}'}")


def count_chips_on_bus(pci_devices: Path) -> int:
    """Return how many NVIDIA chips the PCI bus has, with or without a driver; 0 where nobody can tell."""
    n_chips = 0
    for device in pci_devices.glob("*"):
        try:
            vendor = (device / "vendor").read_text(encoding="ascii").strip()
            kind = (device / "class").read_text(encoding="ascii").strip()
        except OSError:
            continue
        n_chips += vendor == _NVIDIA and kind.startswith(_DISPLAY_CLASS)
    return n_chips


def judge_driver(driver: Driver, smi: Smi, n_on_bus: int) -> Finding:
    """Return whether NVIDIA's driver works.

    Args:
        driver: what its library says.
        smi: what ``nvidia-smi`` says.
        n_on_bus: NVIDIA chips on the PCI bus.
    """
    cuda = None if driver.cuda is None else ".".join(map(str, driver.cuda))
    facts = {"version": smi.driver_version, "cuda": cuda, "chips_on_bus": n_on_bus}

    def finding(status: Status, found: str, remedy: str | None = None) -> Finding:
        return Finding("driver", status, found, remedy, facts)

    if smi.problem is not None:
        return finding("warning", smi.problem, _remedy_for_smi(smi.problem))
    if cuda is None and smi.driver_version is None:
        if n_on_bus == 0:
            return finding("absent", "no NVIDIA driver, and no NVIDIA chip is seen")
        return finding(
            "warning",
            f"no NVIDIA driver, but NVIDIA chips are on the PCI bus ({n_on_bus})",
            "install NVIDIA's driver (580 or later for CUDA 13, 525 or later for CUDA 12); a container must be started "
            "with its GPUs (docker run --gpus all, with NVIDIA's container toolkit)",
        )
    if cuda is None:
        return finding(
            "warning",
            f"NVIDIA driver {smi.driver_version}, but its library libcuda.so.1 is not found or does not work",
            "let the loader find it (ldconfig, LD_LIBRARY_PATH); a container needs "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        )
    version = smi.driver_version or "(version not known: no nvidia-smi)"
    found = f"NVIDIA driver {version}, runs CUDA up to {cuda}"
    if driver.problem is not None:
        problem, remedy = split_remedy(driver.problem)
        return finding("warning", f"{found}, but {problem}", remedy or "see nvidia-smi")
    return finding("ok", found)


def judge_chips(driver: Driver, smi: Smi) -> Finding:
    """Return the chips that this process may use, beside all that the machine has.

    Args:
        driver: what the driver's library says.
        smi: what ``nvidia-smi`` says.
    """
    visible = [f"{chip.name}, {chip.architecture}" for chip in driver.chips]
    listed = [
        chip.name
        + (f", sm_{chip.capability.replace('.', '')}" if chip.capability else "")
        + (f", {gib(chip.memory_bytes)}" if chip.memory_bytes else "")
        for chip in smi.chips
    ]
    facts = {
        "usable": [chip._asdict() for chip in driver.chips],
        "installed": [chip._asdict() for chip in smi.chips],
    }
    if not visible and not listed:
        return Finding("chips", "absent", "no NVIDIA chip: training runs on the CPU", facts=facts)
    # nvidia-smi also knows the memory, but not which of several chips are left to this process.
    found = _counted(listed if len(listed) == len(visible) or not visible else visible)
    if len(visible) == len(listed) or not listed:
        return Finding("chips", "ok", found, facts=facts)
    if visible:
        return Finding("chips", "ok", f"{found} ({len(listed)} in the machine)", facts=facts)
    return Finding(
        "chips",
        "warning",
        f"{found}; none of them can be used by this process",
        "see what is said of the driver; if CUDA_VISIBLE_DEVICES is set, it must name chips that are there",
        facts,
    )


def _counted(texts: list[str]) -> str:
    """Write each kind once, with its number."""
    kinds = dict.fromkeys(texts)
    return "; ".join(f"{n} x {kind}" if (n := texts.count(kind)) > 1 else kind for kind in kinds)


def _remedy_for_smi(problem: str) -> str:
    if "version mismatch" in problem:
        return "the driver was updated while an older one was loaded: reboot"
    if "did not answer" in problem:
        return "a chip may have hung: look for 'Xid' in the kernel's log (dmesg), then reboot"
    return (
        "load the driver's module (modprobe nvidia) or reboot; if that does not help, install the driver anew"
    )


def _chip(row: list[str]) -> SmiChip:
    _, name, memory, *capability = row
    n_bytes = int(memory) * _MIB if memory.isdigit() else None
    return SmiChip(name, n_bytes, capability[0] if capability else None)
