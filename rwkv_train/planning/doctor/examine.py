"""Look at everything that training needs, and say whether it can run."""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rwkv_train
from rwkv_train.ops.build import COMPILERS, default_cache_folder, find_ninja
from rwkv_train.ops.cuda_driver import Driver, ask_driver
from rwkv_train.ops.cuda_toolkit import find_toolkit, host_compiler
from rwkv_train.planning.doctor.backends import BackendRow, judge_backends, ops_without_backend
from rwkv_train.planning.doctor.finding import Finding
from rwkv_train.planning.doctor.judge import (
    REINSTALL,
    judge_deepspeed,
    judge_lightning,
    judge_torch,
    judge_training,
    requirement_of,
    works,
)
from rwkv_train.planning.doctor.machine import examine_machine
from rwkv_train.planning.doctor.nvidia import (
    PCI_DEVICES,
    ask_smi,
    count_chips_on_bus,
    judge_chips,
    judge_driver,
)
from rwkv_train.planning.doctor.packages import (
    EXTRAS,
    find_extras,
    find_requirements,
    installed_version,
    read_requirements,
)
from rwkv_train.planning.doctor.probe import probe
from rwkv_train.planning.doctor.toolchain import find_compiler, find_cuda_compiler, find_ninja_program

_PACKAGE = Path(rwkv_train.__file__).resolve().parent


class Report(NamedTuple):
    """What was found, and what follows."""

    findings: tuple[Finding, ...]
    backends: tuple[BackendRow, ...]
    device: str | None
    """Kind of the device that training takes by itself, ``"cuda"`` or ``"cpu"``; ``None`` where that is not known."""
    obstacles: tuple[str, ...]
    """Why training cannot run; none where it can."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON's types; names in it stay the same from version to version."""
        return {
            "can_train": not self.obstacles,
            "device": self.device,
            "obstacles": list(self.obstacles),
            "findings": {finding.id: finding.to_json() for finding in self.findings},
            "backends": [row._asdict() for row in self.backends],
        }


def examine(say: Callable[[str], None]) -> Report:
    """Examine this machine and this installation; kernels that have not been built yet are built.

    Args:
        say: gets what the build of a kernel says while it runs.
    """
    requirements = read_requirements(_PACKAGE.parent / "pyproject.toml")
    driver, smi = ask_driver(), ask_smi(shutil.which("nvidia-smi"))
    n_on_bus = count_chips_on_bus(PCI_DEVICES)
    n_installed = max(len(driver.chips), len(smi.chips), n_on_bus)
    found = [
        *examine_machine(default_cache_folder, _PACKAGE, rwkv_train.__version__),
        judge_driver(driver, smi, n_on_bus),
        judge_chips(driver, smi),
        find_cuda_compiler(find_toolkit, host_compiler, driver, has_chips=n_installed > 0),
        find_compiler(COMPILERS),
        find_ninja_program(find_ninja),
        find_requirements(requirements, installed_version),
    ]
    results = probe(say, search_path=sys.path)
    report = judge(results, driver, n_installed=n_installed, requirements=requirements)
    extras = find_extras(EXTRAS, installed_version)
    return report._replace(findings=(*found, *report.findings, *extras))


def judge(
    results: Mapping[str, Mapping[str, Any]], driver: Driver, *, n_installed: int, requirements: Sequence[str]
) -> Report:
    """Return what follows from the trials. Pure.

    Args:
        results: what came of each, as :func:`probe` returns it.
        driver: NVIDIA's driver.
        n_installed: NVIDIA chips in the machine, whether or not they can be used.
        requirements: what rwkv-train requires, as pip writes it.
    """
    torch, backends, lightning, training, deepspeed = (
        results.get(name, {}) for name in ("torch", "backends", "lightning", "training", "deepspeed")
    )
    torch_works, lightning_works = works(torch), works(lightning)
    wanted_torch, wanted_lightning = (requirement_of(name, requirements) for name in ("torch", "lightning"))
    packages = (
        judge_torch(torch, driver, n_installed=n_installed, requirement=wanted_torch),
        judge_lightning(lightning, torch_works=torch_works, requirement=wanted_lightning),
        judge_training(training, packages_work=lightning_works),
    )
    trials = {name: facts for name, facts in results.items() if " " in name}
    rows = judge_backends(trials, backends.get("preferences", {}))
    device = training.get("device")
    # Not what only follows from another one.
    roots = zip(packages, (True, torch_works, lightning_works), strict=True)
    obstacles = [
        f"{one.id}: {one.found}; {one.remedy}" for one, is_root in roots if is_root and one.status == "error"
    ]
    if torch_works and not works(backends):
        obstacles.append(f"the backends cannot be listed ({backends.get('problem')}); {REINSTALL}")
    if device is not None and (without := ops_without_backend(rows, device)):
        obstacles.append(f"no backend of {', '.join(without)} runs on {device}; see the table of backends")
    findings = (
        *packages,
        *judge_deepspeed(deepspeed, torch_works=torch_works, cuda=torch.get("cuda")),
    )
    return Report(findings, tuple(rows), device, tuple(obstacles))
