import json
import sys

import pytest
import torch

from rwkv_train.checkpoints import ParameterState, save_training_checkpoint
from rwkv_train.checkpoints.lock import hold_run_folder
from rwkv_train.checkpoints.retention import BestCheckpoint, write_best
from rwkv_train.commands import main
from rwkv_train.config.model import LoraRanks, Rwkv7Config
from rwkv_train.config.save import to_tree
from rwkv_train.models.registry import build_model

MODEL = Rwkv7Config(
    n_layer=1, n_embd=16, head_size=8, vocab_size=20, ctx_len=8, lora_ranks=LoraRanks(w=2, a=2, v=2, g=2)
)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line; give exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rwkv-train", "checkpoints", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return stop.value.code, printed.out, printed.err

    return run


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of four steps: 20 is a milestone, 10 the best, 15 was saved last."""
    weights = build_model(MODEL, wkv_backend="reference").state_dict()
    for step in (5, 10, 20, 15):
        manifest = {
            "step": step,
            "tokens": 1000 * step,
            "config": {"checkpoint": {"keep_every_n_steps": 20}},
            "arch_config": to_tree(MODEL),
            "tokenizer": None,
            "random": {},
            "data": {},
            "validation": {"total": {"documents": 2, "tokens": 4, "bytes": 9, "nats": 0.5 * step}},
        }
        parameters = [ParameterState(name, torch.zeros_like(w), w, w) for name, w in weights.items()]
        save_training_checkpoint(tmp_path / "run", manifest, parameters)
    write_best(tmp_path / "run", BestCheckpoint("step-00000010", 10, 1.25))
    return tmp_path / "run"


def names_in(run):
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def flip_last_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_list_shows_every_checkpoint_with_its_marks(run, command):
    (run / "checkpoints/step-00000005/optimizer.safetensors").unlink()
    code, out, _ = command("list", run)
    rows = {name: line.split("│") for line in out.splitlines() for name in names_in(run) if name in line}
    assert code == 0
    assert [rows[name][-2].strip() for name in sorted(rows)] == ["incomplete", "best", "newest", "milestone"]
    assert [cell.strip() for cell in rows["step-00000010"][2:4]] == ["10", "10,000"]
    assert rows["step-00000010"][6].strip() == "1.2500"  # 5 nats over 4 tokens


def test_list_as_json_has_exact_values(run, command):
    code, out, _ = command("list", run, "--json")
    first = json.loads(out)[0]
    assert code == 0
    assert first["size_bytes"] == sum(
        file.stat().st_size for file in (run / "checkpoints/step-00000005").iterdir()
    )
    assert (first["step"], first["tokens"], first["validation_loss"], first["marks"]) == (5, 5000, 0.625, [])
    assert first["saved_at"].endswith("+00:00")


@pytest.mark.parametrize("name", ["list", "verify"])
def test_a_folder_without_checkpoints_is_refused(tmp_path, command, name):
    code, _, err = command(name, tmp_path)
    assert code == 2
    assert err == (
        f"error: {tmp_path} holds no training checkpoint; give the out_dir of a run, which has checkpoints/\n"
    )


@pytest.mark.parametrize("path", [".", "checkpoints/step-00000010"], ids=["run", "one-checkpoint"])
def test_verify_is_content_with_whole_checkpoints(run, command, path):
    code, out, err = command("verify", run / path)
    assert (code, err) == (0, "")
    assert out.count("whole") == (4 if path == "." else 1)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "manifest.json"])
def test_verify_names_a_damaged_file_and_leaves_with_2(run, command, file):
    if file == "manifest.json":
        (run / "checkpoints/step-00000010" / file).write_text("{}")
    else:
        flip_last_bit(run / "checkpoints/step-00000010" / file)
    for path in (run, run / "checkpoints/step-00000010"):
        code, _, err = command("verify", path)
        assert code == 2
        assert f"damaged: step-00000010/{file};" in err
        assert err.count("\n") == 1


def test_verify_names_every_damaged_file_in_json_too(run, command):
    for file in ("model.safetensors", "optimizer.safetensors"):
        flip_last_bit(run / "checkpoints/step-00000010" / file)
    (run / "checkpoints/step-00000020/manifest.json").unlink()
    code, out, _ = command("verify", run, "--json")
    damaged = {entry["folder"].rpartition("/")[2]: entry["damaged"] for entry in json.loads(out)}
    assert code == 2
    assert damaged == {
        "step-00000005": [],
        "step-00000010": ["model.safetensors", "optimizer.safetensors"],
        "step-00000015": [],
        "step-00000020": ["manifest.json"],
    }


def test_prune_keeps_the_last_the_best_and_milestones_and_says_what_it_removed(run, command):
    code, out, _ = command("prune", run, "--keep-last", "1", "--keep-every", "20")
    assert (code, out.split()) == (0, ["removed", str(run / "checkpoints/step-00000005")])
    assert names_in(run) == ["step-00000010", "step-00000015", "step-00000020"]
    assert command("prune", run, "--keep-last", "2")[:2] == (0, "nothing to remove\n")


def test_prune_as_a_trial_removes_nothing(run, command):
    code, out, _ = command("prune", run, "--keep-last", "1", "--dry-run")
    assert code == 0
    assert [line.rpartition("/")[2] for line in out.splitlines()] == ["step-00000005", "step-00000020"]
    assert len(names_in(run)) == 4


def test_prune_is_refused_while_the_run_goes_on(run, command):
    with hold_run_folder(run):
        code, _, err = command("prune", run, "--keep-last", "1")
    assert code == 2
    assert "is in use by another run" in err
    assert len(names_in(run)) == 4


@pytest.mark.parametrize("arguments", [[], ["--keep-last", "0"], ["--keep-last", "1", "--keep-every", "0"]])
def test_prune_needs_to_know_how_many_stay(run, command, arguments):
    assert command("prune", run, *arguments)[0] == 2
    assert len(names_in(run)) == 4
