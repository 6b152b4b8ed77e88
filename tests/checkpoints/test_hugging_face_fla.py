"""Folders for flash-linear-attention against what version 0.6 has and makes of them; see fixtures/take_*.py."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from rwkv_train.checkpoints.hugging_face import hugging_face_layout
from rwkv_train.config.model import LoraRanks, Rwkv6Config, Rwkv6Ranks, Rwkv7Config
from rwkv_train.models.registry import build_model

FIXTURES = Path(__file__).with_name("fixtures")
TAKEN = json.loads((FIXTURES / "flash_linear_attention_0_6.json").read_text(encoding="utf-8"))
CONFIGS = {
    "rwkv6": Rwkv6Config(n_layer=2, n_embd=128, vocab_size=13, lora_ranks=Rwkv6Ranks(shift=16, decay=32)),
    "rwkv7": Rwkv7Config(n_layer=2, n_embd=128, vocab_size=13, lora_ranks=LoraRanks(w=16, a=24, v=32, g=40)),
}
OURS = {"max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 0}
"""Keys in which our folders differ from the defaults of flash-linear-attention on purpose."""

# Logits have a standard deviation of 2; a wrong epsilon of one norm gives 5e-4 and more.
TOLERANCE = 5e-5


@pytest.fixture(scope="module", params=CONFIGS)
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def weights(arch):
    spec = importlib.util.spec_from_file_location("formula_weights", FIXTURES / "formula_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = build_model(CONFIGS[arch], device="meta")
    return module.formula_weights({name: list(tensor.shape) for name, tensor in model.state_dict().items()})


@pytest.fixture(scope="module")
def layout(arch, weights):
    return hugging_face_layout(CONFIGS[arch], weights)


def test_names_and_shapes_are_those_of_its_model(arch, layout):
    found = {name: list(tensor.shape) for name, tensor in layout.tensors.items()}

    assert found == TAKEN[arch]["tensors"]


def test_headers_tell_shapes_and_dtypes_without_values(layout):
    for name, header in layout.tensors.headers.items():
        tensor = layout.tensors[name]
        assert (header.device.type, header.shape, header.dtype) == ("meta", tensor.shape, tensor.dtype)
        assert tensor.is_contiguous()


def test_config_has_all_that_its_class_takes_and_the_same_values(arch, layout):
    # RWKV-6's heads have another epsilon than its other norms, of which the class knows one.
    epsilon = {"norm_eps": 64e-5} if arch == "rwkv6" else {}
    config = dict(layout.config_json)

    assert config.pop("model_type") == TAKEN[arch]["model_type"]
    assert config.pop("architectures") == TAKEN[arch]["architectures"]
    assert config.pop("torch_dtype") == "float32"
    assert config == TAKEN[arch]["config"] | OURS | epsilon


def test_weights_are_those_that_its_logits_were_taken_with(arch, layout):
    digest = hashlib.sha256()
    for name in sorted(layout.tensors):
        digest.update(name.encode() + layout.tensors[name].numpy().tobytes())

    assert digest.hexdigest() == TAKEN[arch]["sha256"]


def test_its_logits_are_ours(arch, weights):
    model = build_model(CONFIGS[arch])
    model.load_state_dict(weights)
    with torch.no_grad():
        ours = model(torch.tensor([TAKEN["tokens"]])).logits[0]

    theirs = torch.tensor(TAKEN[arch]["logits"])
    assert 1.0 < theirs.std() < 4.0, "the tolerance is meant for logits of about this size"
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
