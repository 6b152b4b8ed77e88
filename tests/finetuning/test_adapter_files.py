"""Adapters in files: peft and we read what we write, and both compute what was trained."""

import json

import pytest
import torch
from safetensors.torch import load_file

from rwkv_train.checkpoints import merge, read_adapter
from rwkv_train.models.registry import build_model
from tests.finetuning.adapter_models import MODELS, VARIANTS, base_model, logits, trained, write

TOLERANCE = 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("arch", MODELS)
def test_merged_weights_give_the_logits_of_the_adapter(tmp_path, arch, variant):
    found = trained(arch, **VARIANTS[variant])
    expected = logits(found.model)
    assert (expected - logits(base_model(arch))).abs().max() > 0.1

    adapter = read_adapter(write(tmp_path, found))
    merged = build_model(found.model.config, wkv_backend="reference")
    merged.load_state_dict(dict(merge(found.base, adapter)))
    torch.testing.assert_close(logits(merged.eval()), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_reads_it_and_computes_the_same(tmp_path, variant):
    from peft import PeftModel

    found = trained(**VARIANTS[variant])
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base_model(), str(write(tmp_path, found))).eval()
    torch.testing.assert_close(logits(loaded), logits(found.model), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", ["lora", "dora", "miss"])
def test_it_is_the_file_that_peft_writes(tmp_path, variant):
    from peft import LoraConfig, MissConfig, get_peft_model

    settings = {"target_modules": ["blocks.0.att.key", "blocks.1.ffn.value"], "r": 4}
    lora = {"use_dora": variant == "dora", "lora_alpha": 32}
    config = MissConfig(**settings) if variant == "miss" else LoraConfig(**settings, **lora)
    theirs = get_peft_model(base_model(), config)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    found = trained(variant=variant, targets=settings["target_modules"])
    ours = write(tmp_path / "ours", found)

    shapes, expected = (
        {name: tensor.shape for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
        for folder in (ours, tmp_path / "theirs")
    )
    assert shapes == expected
    written, default = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, tmp_path / "theirs")
    )
    differing = {name for name, value in written.items() if value != default[name]}
    assert differing <= {"target_modules"}
    assert set(written["target_modules"]) == set(default["target_modules"])


def test_an_adapter_that_peft_wrote_is_merged(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = base_model()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = LoraConfig(
        r=4,
        lora_alpha=9,
        target_modules=["key", "value"],
        rank_pattern={r"blocks\.1\..*": 2},
        alpha_pattern={"ffn.value": 3},
        init_lora_weights=False,  # random, so that there is something to merge
    )
    model = get_peft_model(base, config).eval()
    model.save_pretrained(str(tmp_path))
    merged = build_model(base.config, wkv_backend="reference")
    merged.load_state_dict(dict(merge(weights, read_adapter(tmp_path))))
    torch.testing.assert_close(logits(merged.eval()), logits(model), rtol=0, atol=TOLERANCE)


def test_the_note_says_what_it_was_given(tmp_path):
    found = trained()
    note = read_adapter(write(tmp_path, found)).note
    assert (note.template, note.step, note.tokenizer.name) == ("g1", 3, "bytes")
    assert note.model.arch == "rwkv7"
    assert note.model.n_embd == 32
