"""From what came of the trials to findings: what is wrong, and what to do."""

from collections.abc import Mapping, Sequence
from typing import Any

from rwkv_train.ops.cuda_driver import Driver
from rwkv_train.ops.cuda_toolkit import DRIVER_OF
from rwkv_train.planning.doctor.finding import Finding, Status

Facts = Mapping[str, Any]
"""What came of an attempt; a ``"problem"`` where it failed."""

REINSTALL = "install rwkv-train anew, with all that it requires"
_TORCH_FIRST = "repair torch first, which it needs"
_TABLE = "the table on pytorch.org names the command"


def judge_torch(facts: Facts, driver: Driver, *, n_installed: int, requirement: str) -> Finding:
    """Return whether torch can be imported and uses the chips that are there.

    Args:
        facts: what came of importing it.
        driver: NVIDIA's driver.
        n_installed: NVIDIA chips in the machine, whether or not they can be used.
        requirement: how pip writes the versions that rwkv-train takes.
    """
    if not works(facts):
        return Finding("torch", "error", _not_imported(facts), _install(facts, "torch", requirement), facts)
    found = f"{facts['version']}, {'CUDA ' + facts['cuda'] if facts['cuda'] else 'without CUDA'}"
    if facts["cuda"] is None:
        if n_installed == 0:
            return Finding("torch", "ok", found, facts=facts)
        return Finding(
            "torch",
            "warning",
            f"{found}, so training takes the CPU although there are NVIDIA chips",
            f"install a torch with CUDA ({_TABLE})",
            facts,
        )
    # torch counts chips without starting CUDA, so training would choose them and fail.
    status: Status = "error" if facts["cuda_devices"] else "warning"
    major = int(facts["cuda"].split(".")[0])
    if driver.cuda is not None and major > driver.cuda[0]:
        oldest = f" to {DRIVER_OF[major]} or later" if major in DRIVER_OF else ""
        return Finding(
            "torch",
            status,
            f"{found}, but the driver runs CUDA up to {driver.cuda[0]}.{driver.cuda[1]}",
            f"update the driver{oldest}, or install a torch for CUDA {driver.cuda[0]} ({_TABLE})",
            facts,
        )
    if facts["cuda_problem"] is not None:
        return Finding(
            "torch",
            status,
            f"{found}, but CUDA does not start ({facts['cuda_problem']})",
            "see what is said of the driver; set trainer.accelerator to 'cpu' to train without it",
            facts,
        )
    if facts["cuda_devices"] == 0 and n_installed > 0:
        return Finding(
            "torch",
            "warning",
            f"{found}, but it sees none of the NVIDIA chips that are there",
            "see what is said of the driver; if CUDA_VISIBLE_DEVICES is set, it must name chips that are there",
            facts,
        )
    n_seen = facts["cuda_devices"]
    return Finding("torch", "ok", f"{found}, sees {n_seen} GPU{'' if n_seen == 1 else 's'}", facts=facts)


def judge_lightning(facts: Facts, *, torch_works: bool, requirement: str) -> Finding:
    """Return whether Lightning can be imported."""
    if works(facts):
        return Finding("lightning", "ok", facts["version"], facts=facts)
    remedy = _install(facts, "lightning", requirement) if torch_works else _TORCH_FIRST
    return Finding("lightning", "error", _not_imported(facts), remedy, facts)


def judge_training(facts: Facts, *, packages_work: bool) -> Finding:
    """Return whether all that training imports is there, and which device it takes.

    Args:
        facts: what came of importing it.
        packages_work: whether torch and Lightning can be imported.
    """
    if works(facts):
        device = "a GPU" if facts["device"] == "cuda" else "the CPU"
        return Finding("training", "ok", f"all that it imports is there; it takes {device}", facts=facts)
    remedy = REINSTALL if packages_work else "repair what is named above first"
    return Finding("training", "error", _not_imported(facts), remedy, facts)


def judge_deepspeed(facts: Facts, *, torch_works: bool, cuda: str | None) -> list[Finding]:
    """Return whether DeepSpeed can be imported, and which of its optimizers it can compile.

    Args:
        facts: what came of importing it.
        torch_works: whether torch can be imported.
        cuda: torch's version of CUDA.
    """
    if not works(facts):
        if _is_missing(facts, "deepspeed"):
            found = "not installed; for trainer.strategy deepspeed_1 to deepspeed_3"
            remedy = (
                "pip install deepspeed (Linux alone; the plain installation of rwkv-train brings it there)"
            )
            return [Finding("deepspeed", "absent", found, remedy, facts)]
        remedy = "pip install --force-reinstall deepspeed, or choose the strategy ddp or fsdp2"
        if not torch_works:
            remedy = _TORCH_FIRST
        return [Finding("deepspeed", "warning", _not_imported(facts), remedy, facts)]
    ops: Mapping[str, str | None] = facts["ops"]
    broken = {name: problem for name, problem in ops.items() if problem is not None}
    findings = [Finding("deepspeed", "ok", facts["version"], facts=facts)]
    if not broken:
        found = f"{' and '.join(ops)} can be compiled (on first use, about a minute)"
        return [*findings, Finding("deepspeed_ops", "ok", found, facts={"ops": dict(ops)})]
    tools = "g++ and ninja"
    if "fused_adam" in broken:
        tools = f"NVIDIA's CUDA toolkit {cuda or ''} (nvcc), g++ and ninja".replace("  ", " ")
    return [
        *findings,
        Finding(
            "deepspeed_ops",
            "warning",
            "; ".join(f"{name} cannot be compiled ({problem})" for name, problem in broken.items()),
            f"install {tools}, or leave optim.implementation at 'torch'",
            {"ops": dict(ops)},
        ),
    ]


def works(facts: Facts) -> bool:
    """Tell whether an attempt was made and went well."""
    return bool(facts) and "problem" not in facts


def requirement_of(package: str, requirements: Sequence[str]) -> str:
    """Return how rwkv-train asks pip for a package; its name where that is not known."""
    for requirement in requirements:
        text = requirement.split(";")[0].strip()
        if text.startswith(package) and not text[len(package) : len(package) + 1].isalnum():
            return text
    return package


def _not_imported(facts: Facts) -> str:
    if not facts:
        return "not tried, because something that it needs cannot be imported"
    return f"cannot be imported ({facts['problem']})"


def _install(facts: Facts, package: str, requirement: str) -> str:
    option = "" if _is_missing(facts, package) else "--force-reinstall "
    return f"pip install {option}'{requirement}'"


def _is_missing(facts: Facts, package: str) -> bool:
    return facts.get("kind") == "ModuleNotFoundError" and f"'{package}'" in facts["problem"]
