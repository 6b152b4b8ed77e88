"""A name for the numbers of a model, whatever file holds them."""

import hashlib
import math

import pytest
import torch

from rwkv_train.checkpoints import Weights, fingerprint, read_weights, write_weights
from tests.finetuning.adapter_models import MODELS, base_model

FILES = [
    *((arch, to) for arch in MODELS for to in ("pth", "safetensors")),
    ("rwkv4", "hf"),
    ("rwkv5", "hf-remote"),
    ("rwkv6", "hf-remote"),
    ("rwkv7", "hf"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("arch", "to"), FILES)
def test_it_is_the_same_in_every_format_and_in_every_dtype_that_holds_the_numbers(tmp_path, arch, to, dtype):
    sizes = {} if arch == "rwkv4" else {"n_embd": 64, "head_size": 64}  # as the layouts want them
    model = base_model(arch, **sizes)
    numbers = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    weights = Weights(model.config, {name: x.to(dtype) for name, x in numbers.items()}, None, None)
    path = write_weights(tmp_path / "model", weights, to)
    assert fingerprint(read_weights(path).tensors) == fingerprint(numbers)


def test_it_is_the_hash_that_the_docstring_describes():
    """Small tensors whole, of large ones 64 runs of 1024 values from the first to the last."""
    small, large = torch.arange(6.0).view(2, 3), torch.randn(100_000)
    runs = [large[math.floor(i * (100_000 - 1024) / 63 + 1e-9) :][:1024] for i in range(64)]
    expected = hashlib.sha256()
    expected.update(b"a [2, 3]\n" + small.numpy().tobytes())
    expected.update(b"b [100000]\n" + torch.cat(runs).numpy().tobytes())
    assert fingerprint({"b": large, "a": small}) == expected.hexdigest()


@pytest.mark.parametrize("index", [0, 100_000 - 1, 70_000], ids=["first", "last", "between"])
def test_another_number_gives_another_one(index):
    one = torch.zeros(100_000)
    other = one.clone()
    other[index : index + 1024] = 1
    assert fingerprint({"x": one}) != fingerprint({"x": other})


def test_names_and_shapes_count():
    x = torch.ones(2, 3)
    assert len({fingerprint(each) for each in ({"x": x}, {"y": x}, {"x": x.T}, {"x": x, "y": x})}) == 4


def test_unused_parameters_do_not():
    model = base_model("rwkv7")
    weights = model.state_dict()
    without = {name: tensor for name, tensor in weights.items() if name != "blocks.0.att.v1"}
    assert len(without) == len(weights) - 1
    assert fingerprint(weights) == fingerprint(without)
