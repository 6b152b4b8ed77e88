import json
import sys

import pytest
import torch

from rwkv_train.checkpoints import ParameterState, Weights, save_training_checkpoint, write_weights
from rwkv_train.commands import main
from rwkv_train.config.model import LoraRanks, Rwkv4Config, Rwkv5Config, Rwkv6Config, Rwkv6Ranks, Rwkv7Config
from rwkv_train.config.save import to_tree
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.tokenizers import TokenizerIdentity

RWKV4 = Rwkv4Config(n_layer=3, n_embd=16, vocab_size=20)
RWKV7 = Rwkv7Config(
    n_layer=2, n_embd=64, head_size=16, vocab_size=257, ctx_len=32, lora_ranks=LoraRanks(w=5, a=6, v=7, g=9)
)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line; give exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rwkv-train", "inspect", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return stop.value.code, printed.out, printed.err

    return run


def weights_of(config):
    model = build_model(config)
    initialize(model, seed=0)
    return model.state_dict()


def rows(table):
    """Name -> value of a printed table."""
    lines = [line.strip("│ \n").split("│") for line in table.splitlines() if "│" in line]
    return dict([cell.strip() for cell in line] for line in lines)


def test_a_training_checkpoint_is_described_to_a_machine(tmp_path, command):
    manifest = {
        "step": 500,
        "tokens": 16_000,
        "config": {},
        "tokenizer": {"name": "bytes", "sha256": "ab" * 32},
        "arch_config": to_tree(RWKV7),
        "random": {},
        "data": {},
    }
    parameters = [ParameterState(name, weight, None, None) for name, weight in weights_of(RWKV7).items()]
    save_training_checkpoint(tmp_path, manifest, parameters)
    code, out, err = command(tmp_path, "--json")
    assert (code, err) == (0, "")
    C, F, V, H = 64, 256, 257, 4
    n_vectors = 6 + 3 + 2 + 1 + 2 + 1 + 4  # x_*, biases, k_*, r_k, ln_x, ffn.x_k, ln1 and ln2
    per_layer = 4 * C * C + 2 * C * F + 2 * C * (5 + 6 + 7 + 9) + n_vectors * C
    n_parameters = 2 * V * C + 2 * per_layer + 4 * C
    assert json.loads(out) == {
        "path": str(tmp_path / "checkpoints" / "step-00000500"),
        "format": "training checkpoint",
        "arch": "rwkv7",
        "version": "7",
        "n_layer": 2,
        "n_embd": C,
        "n_head": H,
        "head_size": 16,
        "lora_ranks": {"w": 5, "a": 6, "v": 7, "g": 9},
        "ffn_width": F,
        "vocab_size": V,
        "ctx_len": 32,
        "parameters": n_parameters,
        "dtypes": {"fp32": n_parameters},
        "tokenizer": {"name": "bytes", "sha256": "ab" * 32},
        "step": 500,
        "tokens": 16_000,
    }


def test_an_official_file_is_described_to_a_person(tmp_path, command):
    tensors = {name: tensor.bfloat16() for name, tensor in weights_of(RWKV4).items()}
    torch.save(tensors, tmp_path / "x.pth")
    code, out, err = command(tmp_path / "x.pth")
    assert (code, err) == (0, "")
    assert rows(out) == {
        "path": str(tmp_path / "x.pth"),
        "format": "official .pth",
        "version": "RWKV-4",
        "layers": "3",
        "width": "16",
        "FFN width": "64",
        "vocabulary": "20",
        # The published count of RWKV-4: 2VC + 13C²L + C(11L + 4).
        "parameters": f"{2 * 20 * 16 + 13 * 16**2 * 3 + 16 * (11 * 3 + 4):,}",
        "dtype": "bf16",
    }


def test_a_safetensors_folder_shows_tokenizer_step_and_ranks(tmp_path, command):
    weights = Weights(RWKV7, weights_of(RWKV7), TokenizerIdentity("[world]", "cd" * 32), step=7_000)
    write_weights(tmp_path / "x", weights, "safetensors")
    code, out, _ = command(tmp_path / "x")
    assert code == 0
    expected = {
        "LoRA ranks": "w 5, a 6, v 7, g 9",
        "heads": "4",
        "head size": "16",
        "tokenizer": "[world] (sha256 cdcdcdcdcdcdcdcd)",
        "step": "7,000",
        "training ctx_len": "32",
    }
    assert rows(out).items() >= expected.items()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(
            Rwkv5Config(n_layer=1, n_embd=32, head_size=8, vocab_size=20),
            {"version": "RWKV-5.2", "heads": "4", "head size": "8", "FFN width": "96"},
            id="rwkv5.2",
        ),
        pytest.param(
            Rwkv6Config(
                n_layer=1, n_embd=32, head_size=8, vocab_size=20, lora_ranks=Rwkv6Ranks(shift=3, decay=5)
            ),
            {"version": "RWKV-6", "heads": "4", "LoRA ranks": "shift 3, decay 5", "FFN width": "96"},
            id="rwkv6",
        ),
    ],
)
def test_rwkv5_and_6_are_described(tmp_path, command, config, expected):
    torch.save(weights_of(config), tmp_path / "x.pth")
    code, out, _ = command(tmp_path / "x.pth")
    assert code == 0
    assert rows(out).items() >= expected.items()


def test_a_mixture_of_dtypes_is_counted(tmp_path, command):
    tensors = weights_of(RWKV4)
    tensors["head.weight"] = tensors["head.weight"].half()
    torch.save(tensors, tmp_path / "x.pth")
    _, out, _ = command(tmp_path / "x.pth", "--json")
    description = json.loads(out)
    assert description["dtypes"] == {"fp32": description["parameters"] - 20 * 16, "fp16": 20 * 16}


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04", b"\x80\x04."], ids=["empty", "text", "zip", "pickle"]
)
def test_what_is_no_checkpoint_is_one_line_and_exit_code_2(tmp_path, command, content):
    (tmp_path / "x").write_bytes(content)
    code, out, err = command(tmp_path / "x")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {tmp_path / 'x'} ")
    assert err.count("\n") == 1
