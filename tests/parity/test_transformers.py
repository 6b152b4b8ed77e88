"""RWKV-4 folders in transformers, whose implementation we had no part in."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from rwkv_train.checkpoints.hugging_face import hugging_face_layout
from rwkv_train.config.model import Rwkv4Config

# As in test_pypi_rwkv.py.
TOLERANCE = 5e-5

MODELS = {
    # More layers than the usual rescale_every, which would make the epsilons of the last layer another.
    "seven-layers": Rwkv4Config(n_layer=7, n_embd=64, vocab_size=150),
    # Not one layer: transformers divides by n_layer - 1 when it makes a model.
    "two-layers": Rwkv4Config(n_layer=2, n_embd=48, vocab_size=97),
    "odd-width": Rwkv4Config(n_layer=3, n_embd=37, vocab_size=61),
}


@pytest.fixture(params=MODELS)
def config(request):
    return MODELS[request.param]


@pytest.fixture
def ours(random_model, config):
    return random_model(config)


@pytest.fixture
def theirs(ours, config, tmp_path):
    layout = hugging_face_layout(config, ours.state_dict())
    save_file(dict(layout.tensors), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(layout.config_json), encoding="utf-8")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def tokens_of(config, n_tokens):
    return torch.randint(0, config.vocab_size, (2, n_tokens), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def test_logits_are_those_of_transformers(ours, theirs, config):
    tokens = tokens_of(config, 64)

    expected = theirs(tokens).logits

    assert type(theirs).__name__ == "RwkvForCausalLM"
    assert 1.0 < expected.std() < 4.0, "the tolerance is meant for logits of about this size"
    torch.testing.assert_close(ours(tokens).logits, expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers(ours, theirs, config):
    prompt = tokens_of(config, 8)
    expected = prompt
    for _ in range(24):
        expected = torch.cat([expected, theirs(expected).logits[:, -1:].argmax(-1)], dim=1)

    output, tokens = ours(prompt), prompt
    while tokens.shape[1] < expected.shape[1]:
        chosen = output.logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, chosen], dim=1)
        output = ours(chosen, output.state)

    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_transformers_takes_the_dtype_of_the_folder(random_model, tmp_path, dtype):
    config = MODELS["two-layers"]
    layout = hugging_face_layout(config, random_model(config).to(dtype).state_dict())
    save_file(dict(layout.tensors), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(layout.config_json), encoding="utf-8")

    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype
