"""``rwkv-train merge-adapter``, and the commands that take an adapter beside a checkpoint."""

import json
import sys

import pytest
import torch

from rwkv_train.models.registry import build_model
from tests.finetuning.adapter_models import base_model, logits, trained, write


@pytest.fixture(scope="module")
def found():
    return trained()


@pytest.fixture
def files(found, tmp_path, monkeypatch):
    """A base, its adapter and another base, in the current folder."""
    monkeypatch.chdir(tmp_path)
    torch.save(found.base, tmp_path / "base.pth")
    torch.save(base_model(seed=1).state_dict(), tmp_path / "other.pth")
    write(tmp_path / "adapter", found)
    return tmp_path


def test_the_merged_file_gives_the_logits_of_the_adapter(files, found, call_main, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # merging does without it
    code, out, err = call_main("merge-adapter", "base.pth", "adapter", "merged.pth")
    assert (code, err) == (0, "")
    assert out.startswith(f"wrote {files / 'merged.pth'} (pth, ")

    merged = build_model(found.model.config, wkv_backend="reference")
    merged.load_state_dict(torch.load(files / "merged.pth", weights_only=True))
    torch.testing.assert_close(logits(merged.eval()), logits(found.model), rtol=0, atol=1e-5)


def test_the_options_reach_the_conversion(files, call_main):
    code, out, _ = call_main(
        *(
            "merge-adapter",
            "base.pth",
            "adapter",
            "merged",
            "--to",
            "safetensors",
            "--dtype",
            "bf16",
            "--json",
        )
    )
    assert code == 0
    assert json.loads(out)["to"] == "safetensors"
    # The adapter knows with what its texts were read; the .pth did not.
    assert json.loads((files / "merged" / "config.json").read_text())["tokenizer"]["name"] == "bytes"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("other.pth", "adapter", "x.pth"),
            "is for another base: it was trained on weights with the fingerprint ",
        ),
        (("base.pth", "base.pth", "x.pth"), "base.pth is a file; an adapter is a folder"),
        (("base.pth", "gone", "x.pth"), "gone: there is no such file or folder"),
        (("adapter", "adapter", "x.pth"), "adapter is not a checkpoint"),
        (("base.pth", "adapter", "base.pth"), "base.pth is already there"),
        (("base.pth", "adapter", "x.pth", "--dtype", "q8_0"), "--dtype q8_0 is for --to gguf"),
    ],
    ids=["other-base", "no-adapter", "gone", "no-base", "there", "dtype"],
)
def test_what_a_user_can_repair_is_one_line_and_exit_code_2(files, call_main, arguments, sentence):
    before = sorted(files.iterdir())
    code, out, err = call_main("merge-adapter", *arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1
    assert sorted(files.iterdir()) == before


def test_an_adapter_without_our_note_needs_the_option(files, call_main):
    (files / "adapter" / "rwkv_train.json").unlink()
    code, _, err = call_main("merge-adapter", "base.pth", "adapter", "merged.pth")
    assert code == 2
    assert "--unchecked-base" in err
    code, _, err = call_main("merge-adapter", "base.pth", "adapter", "merged.pth", "--unchecked-base")
    assert (code, err) == (0, "")


def test_generate_and_eval_ppl_merge_in_memory(files, found, call_main):
    call_main("merge-adapter", "base.pth", "adapter", "merged", "--to", "safetensors")
    options = ("--tokenizer", "bytes", "--prompt", "ab", "--max-tokens", "20", "--temperature", "0")
    expected = call_main("generate", "--checkpoint", "merged", *options)
    alone = call_main("generate", "--checkpoint", "base.pth", *options)
    assert expected != alone
    assert call_main("generate", "--checkpoint", "base.pth", "--adapter", "adapter", *options) == expected

    (files / "text.txt").write_text("some text to be scored")
    code, out, _ = call_main(
        *("eval-ppl", "--data", "text.txt", "--tokenizer", "bytes", "--json", "scores.json"),
        *("--checkpoint", "merged", "--checkpoint", "base.pth", "--checkpoint", "base.pth"),
        *("--adapter", "none", "--adapter", "adapter", "--adapter", "none"),
    )
    assert code == 0
    assert "[2] base.pth + adapter (tokenizer: bytes" in out
    merged, adapted, base = json.loads((files / "scores.json").read_text())["checkpoints"]
    assert adapted["adapter"] == "adapter"
    assert adapted["total"]["loss"] == pytest.approx(merged["total"]["loss"], abs=1e-6)
    assert base["total"]["loss"] != pytest.approx(merged["total"]["loss"], abs=1e-3)


def test_eval_ppl_wants_an_adapter_for_each_checkpoint(files, call_main):
    code, _, err = call_main(
        *("eval-ppl", "--data", "text.txt", "--adapter", "adapter"),
        *("--checkpoint", "base.pth", "--checkpoint", "base.pth"),
    )
    assert code == 2
    assert "--adapter is given 1 times for 2 checkpoints" in err
