"""Who may import whom: the table of CONTRIBUTING.md, held against the code."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rwkv_train"
LEAVES = {"errors", "assets"}
BELOW_TRAINING = {
    "config",
    "ops",
    "tokenizers",
    "models",
    "data",
    "checkpoints",
    "generation",
    "evaluation",
    "finetuning",
    "parallel",
}
MAY_IMPORT = {
    "config": set(),
    "ops": set(),
    "tokenizers": set(),
    "models": {"config", "ops"},
    "data": {"config", "tokenizers"},
    "checkpoints": {"config", "models", "tokenizers"},
    "generation": {"config", "models", "checkpoints", "tokenizers"},
    "evaluation": {"config", "models", "ops", "checkpoints", "tokenizers", "data", "generation"},
    "finetuning": {"config", "models", "ops", "checkpoints", "tokenizers", "data"},
    "parallel": {"config"},
    "training": BELOW_TRAINING,
    "planning": BELOW_TRAINING | {"training"},
    "benchmarks": BELOW_TRAINING | {"training", "planning"},
    "commands": BELOW_TRAINING | {"training", "planning", "benchmarks"},
}
ONLY_IN = {
    "pydantic": ("config/",),
    "lightning": ("training/", "data/module.py", "parallel/world.py"),
    "deepspeed": ("training/",),
    "typer": ("commands/",),
    "rich": ("commands/", "training/progress.py"),
    "wandb": ("training/loggers.py",),
    "peft": ("finetuning/",),
    "bitsandbytes": ("finetuning/",),
    "lm_eval": ("evaluation/harness.py", "evaluation/harness_tasks.py", "benchmarks/evaluating.py"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            modules.add(str(node.module))
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_a_package_imports_only_what_lies_below_it(package):
    allowed = MAY_IMPORT[package] | LEAVES | {package}
    for path in (PACKAGE / package).rglob("*.py"):
        ours = {m.split(".")[1] for m in imported_modules(path) if m.startswith("rwkv_train.")}
        above = {
            name for name in ours - allowed if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()
        }
        assert not above, f"{path.relative_to(PACKAGE)} imports {above}"


def test_every_package_is_in_the_table():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT)


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_a_library_is_imported_only_where_it_belongs(library):
    for path in FILES:
        uses = any(m == library or m.startswith(f"{library}.") for m in imported_modules(path))
        place = path.relative_to(PACKAGE).as_posix()
        assert not uses or place.startswith(ONLY_IN[library]), f"{place} imports {library}"


def test_there_is_no_drawer_for_odds_and_ends():
    assert not [path for path in FILES if path.stem in {"utils", "util", "helpers", "misc", "common"}]


def test_the_wheel_lists_every_package():
    import tomllib

    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in PACKAGE.rglob("__init__.py")}
    for name in ("configs", "cuda"):
        folder = PACKAGE.parent / name
        holding = {folder, *(path.parent for path in folder.rglob("*") if path.is_file())}
        found |= {".".join(("rwkv_train", f"_{name}", *path.relative_to(folder).parts)) for path in holding}
    assert listed == found
