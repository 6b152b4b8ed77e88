"""What starting the program costs, and the two other ways of starting it."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
HEAVY = {"torch", "lightning", "deepspeed", "datasets", "wandb", "numpy", "matplotlib", "tokenizers"}
COMMANDS = [
    "pretrain",
    "prepare-data",
    "preview-data",
    "eval-ppl",
    "eval-lambada",
    "eval-harness",
    "convert-checkpoint",
    "merge-adapter",
    "generate",
    "chat",
    "inspect",
    "init-weights",
    "checkpoints",
    "bench",
    "doctor",
    "build-kernels",
]


def run(*arguments, **options):
    return subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=120, **options)


def modules_after(*arguments):
    script = (
        "import sys; from rwkv_train.commands import main\n"
        f"sys.argv = ['rwkv-train', *{list(arguments)!r}]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print('MODULES', *sys.modules)"
    )
    result = run(sys.executable, "-c", script)
    assert "MODULES" in result.stdout, result.stderr
    return set(result.stdout.rpartition("MODULES")[2].split())


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--help"], ["--version"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments):
    assert not modules_after(*arguments) & HEAVY


def test_the_launcher_of_a_checkout_lists_every_command(tmp_path):
    result = run(sys.executable, str(CHECKOUT / "cli.py"), "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert all(f" {command} " in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = run(sys.executable, str(CHECKOUT / "cli.py"), command, "--help")
    assert result.returncode == 0
    assert "Usage" in result.stdout


def test_shell_completion_is_offered():
    # Under the launcher's own name, as the script of the shell sets it.
    environment = {"_RWKV_TRAIN_COMPLETE": "complete_bash", "COMP_WORDS": "rwkv-train pre", "COMP_CWORD": "1"}
    result = run(
        sys.executable,
        "-c",
        "import sys; sys.argv = ['rwkv-train']; from rwkv_train.commands import main; main()",
        env={"PATH": "/usr/bin:/bin", **environment},
    )
    assert result.stdout.split() == ["pretrain", "prepare-data", "preview-data"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pretrain", "--config", "quikstart"], "did you mean 'quickstart'?"),
        (["pretrain", "--config", "quickstart", "--set", "optim.lrr=1"], "did you mean 'lr'?"),
        (
            ["pretrain", "--config", "quickstart", "--set", "model.n_embd=100"],
            "must be a multiple of head_size",
        ),
        (["pretrain"], "Missing option '--config'"),
    ],
    ids=["preset", "name", "shape", "option"],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, sentence):
    result = run(sys.executable, str(CHECKOUT / "cli.py"), *arguments)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
