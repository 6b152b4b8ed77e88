"""The Python packages that rwkv-train wants, as they are installed; none of them is imported."""

import importlib.metadata
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rwkv_train.planning.doctor.finding import Finding

DISTRIBUTION = "rwkv-train"


class Extra(NamedTuple):
    """A package that only some jobs need."""

    package: str
    extra: str | None
    """The extra of rwkv-train that brings it; ``None`` where the plain installation does."""
    use: str


EXTRAS = (
    Extra("rensa", "dedup", "prepare-data --dedup minhash"),
    Extra("gguf", "gguf", "convert-checkpoint --to gguf"),
    Extra("lm-eval", "lm-eval", "eval-harness"),
    Extra("peft", "finetune", "finetune.method lora"),
    Extra("bitsandbytes", "quantize", "finetune.quantize nf4"),
    Extra("tensorboard", "tensorboard", "trainer.tensorboard"),
    Extra("wandb", None, "trainer.wandb_project"),
    Extra("datasets", None, "texts from Hugging Face"),
    Extra("transformers", None, "bench evaluating"),
    Extra("flash-linear-attention", None, "bench kernels, as a peer"),
)

FindVersion = Callable[[str], str | None]
"""Name of a distribution -> the version that is installed, or ``None``."""


def installed_version(package: str) -> str | None:
    """Return the version of a distribution that is installed, or ``None``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_requirements(pyproject: Path) -> list[str]:
    """Return what rwkv-train requires, as pip writes it, without its extras.

    Args:
        pyproject: the file of a checkout, which is newer than what pip noted; need not be there.
    """
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        if project["name"] == DISTRIBUTION:
            return list(project["dependencies"])
    try:
        noted = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [requirement for requirement in noted if "extra ==" not in requirement]


def find_requirements(requirements: Sequence[str], find_version: FindVersion) -> Finding:
    """Return whether all that rwkv-train requires is installed, in versions that it was made for.

    Args:
        requirements: as pip writes them.
        find_version: looks a package up.
    """
    try:
        from packaging.requirements import InvalidRequirement, Requirement  # noqa: PLC0415
    except ImportError:  # it comes with Lightning, so much more is missing
        return Finding(
            "requirements",
            "warning",
            "they cannot be compared without the package 'packaging'",
            f"{sys.executable} -m pip install packaging",
        )
    wrong: dict[str, str] = {}
    n_wanted = 0
    for text in requirements:
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        n_wanted += 1
        found = find_version(wanted.name)
        if found is None:
            wrong[f"{wanted.name}{wanted.specifier}"] = f"{wanted.name} is missing"
        elif not wanted.specifier.contains(found, prereleases=True):
            wrong[f"{wanted.name}{wanted.specifier}"] = f"{wanted.name} is {found}, not {wanted.specifier}"
    facts = {"wanted": n_wanted, "wrong": list(wrong.values())}
    if wrong:
        install = " ".join(f"'{requirement}'" for requirement in wrong)
        return Finding("requirements", "warning", "; ".join(wrong.values()), f"pip install {install}", facts)
    if n_wanted == 0:
        return Finding("requirements", "ok", "not known: rwkv-train is not installed with pip", facts=facts)
    return Finding("requirements", "ok", f"all {n_wanted} packages are there", facts=facts)


def find_extras(extras: Sequence[Extra], find_version: FindVersion) -> list[Finding]:
    """Return which packages that only some jobs need are installed."""
    findings = []
    for package, extra, use in extras:
        version = find_version(package)
        facts = {"version": version, "extra": extra, "use": use}
        id_ = package.replace("-", "_")
        if version is not None:
            findings.append(Finding(id_, "ok", f"{version}, for {use}", facts=facts))
        else:
            install = f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install {package}"
            findings.append(Finding(id_, "absent", f"not installed; for {use}", install, facts))
    return findings
