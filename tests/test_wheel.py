"""The built wheel, installed elsewhere, works without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
SOURCES = ("rwkv_train", "configs", "cuda", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build from a copy, so that nothing is left in the checkout and nothing stale is in the wheel."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        path = CHECKOUT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Unpack it into a folder with a space in its name and give an environment that finds it there."""
    folder = tmp_path_factory.mktemp("an installation")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return {**os.environ, "PYTHONPATH": str(folder)}, folder


def run(installed, cwd, *arguments):
    environment, _ = installed
    code = "from rwkv_train.commands import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_source_file_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "rwkv_train").rglob("*.py")}
    wanted |= {
        path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "rwkv_train/ops/measured").iterdir()
    }
    for folder in ("configs", "cuda"):
        wanted |= {
            f"rwkv_train/_{path.relative_to(CHECKOUT).as_posix()}"
            for path in (CHECKOUT / folder).rglob("*")
            if path.is_file()
        }
    assert not wanted - names
    assert not any(name.startswith(("cli", "tests", "configs", "cuda")) for name in names)


def test_an_installed_wheel_finds_its_own_files(installed, tmp_path):
    environment, folder = installed
    code = "import rwkv_train.assets as a; print(a.find_asset_folder('configs'), a.find_asset_folder('cuda'), sep='|')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    package = folder / "rwkv_train"
    assert result.stdout.strip() == f"{package / '_configs'}|{package / '_cuda'}"


def test_an_installed_wheel_trains(installed, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    prepared = run(
        installed,
        tmp_path,
        "prepare-data",
        "--input",
        str(text),
        "--tokenizer",
        "bytes",
        "--output",
        "corpus",
    )
    assert prepared.returncode == 0, prepared.stderr

    settings = {
        "data.train": "corpus",
        "data.valid": "null",
        "model.n_layer": 1,
        "model.ctx_len": 16,
        "trainer.max_steps": 2,
        "trainer.out_dir": "run",
    }
    overrides = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    trained = run(installed, tmp_path, "pretrain", "--config", "quickstart", *overrides)

    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run/checkpoints/step-00000002/model.safetensors").is_file()
