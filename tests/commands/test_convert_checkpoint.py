import json
import sys

import pytest
import torch

from rwkv_train.commands import main
from rwkv_train.config.model import Rwkv7Config
from rwkv_train.models.registry import build_model, initialize


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line; give exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rwkv-train", "convert-checkpoint", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return stop.value.code, printed.out, printed.err

    return run


@pytest.fixture
def source(tmp_path):
    model = build_model(Rwkv7Config(n_layer=1, n_embd=16, head_size=8, vocab_size=20))
    initialize(model, seed=0)
    torch.save(model.state_dict(), tmp_path / "source.pth")
    return tmp_path / "source.pth"


def test_there_and_back_prints_what_was_written(tmp_path, source, command):
    code, out, err = command(source, tmp_path / "folder", "--to", "safetensors")
    assert (code, err) == (0, "")
    assert f"wrote {tmp_path / 'folder'} (safetensors, " in out
    assert "read back bit for bit" in out

    code, out, _ = command(tmp_path / "folder", tmp_path / "back.pth", "--to", "pth")
    assert code == 0
    size_bytes = (tmp_path / "back.pth").stat().st_size
    before = torch.load(source, weights_only=True)
    assert f"(pth, {len(before)} tensors, {size_bytes:,} bytes)" in out
    after = torch.load(tmp_path / "back.pth", weights_only=True)
    assert before.keys() == after.keys()
    assert all(after[name].equal(tensor) for name, tensor in before.items())


def test_the_options_reach_the_conversion(tmp_path, source, command):
    (tmp_path / "x.pth").write_text("old")
    code, _, _ = command(
        source, tmp_path / "x.pth", "--to", "pth", "--dtype", "bf16", "--overwrite", "--v7-block0", "drop"
    )
    assert code == 0
    tensors = torch.load(tmp_path / "x.pth", weights_only=True)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "blocks.0.att.v0" not in tensors


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("gone.pth", "x", "--to", "pth"), "gone.pth: there is no such file or folder"),
        (("source.pth", "source.pth", "--to", "pth"), "is already there"),
        (("source.pth", "source.pth/x", "--to", "pth"), "cannot be written"),
        (("bad.pth", "x", "--to", "pth"), "bad.pth is not a checkpoint"),
    ],
    ids=["no-source", "target-there", "file-for-a-folder", "no-checkpoint"],
)
def test_what_a_user_can_repair_is_one_line_and_exit_code_2(
    tmp_path, source, command, monkeypatch, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pth").write_text("nothing")
    before = source.read_bytes()
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert source.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bad.pth", "source.pth"]


def test_an_unknown_format_is_refused(tmp_path, source, command):
    code, _, err = command(source, tmp_path / "x", "--to", "onnx")
    assert code == 2
    assert "onnx" in err


def test_a_dry_run_says_what_would_be_written(tmp_path, source, command):
    code, out, _ = command(source, tmp_path / "x", "--to", "safetensors", "--dry-run")
    assert code == 0
    assert out.startswith(f"would write {tmp_path / 'x'} (safetensors, ")
    assert not (tmp_path / "x").exists()


def test_a_program_gets_one_json_object(tmp_path, source, command):
    code, out, _ = command(source, tmp_path / "x.pth", "--to", "pth", "--v7-block0", "drop", "--json")
    assert code == 0
    assert json.loads(out) == {
        "path": str(tmp_path / "x.pth"),
        "to": "pth",
        "arch": "rwkv7",
        "n_tensors": len(torch.load(tmp_path / "x.pth", weights_only=True)),
        "size_bytes": (tmp_path / "x.pth").stat().st_size,
        "is_written": True,
    }


def test_a_source_of_another_format_than_was_said_is_refused(tmp_path, source, command):
    code, _, err = command(source, tmp_path / "x", "--to", "pth", "--from", "deepspeed")
    assert code == 2
    assert "found official .pth, wanted DeepSpeed checkpoint folder" in err
    assert not (tmp_path / "x").exists()
