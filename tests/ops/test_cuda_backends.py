"""What the CUDA backends on tensor cores refuse, without a GPU."""

import pytest
import torch

from rwkv_train.ops.backends import Problem
from rwkv_train.ops.cuda import refuses_cuda

FITS = Problem("cuda", torch.bfloat16, 64, capability=90)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"head_size": 128},
        {"capability": 80},
        {"capability": 120},
        {"capability": None},
        {"is_packed": True},
    ],
    ids=["usual", "heads-128", "oldest", "consumer", "unknown", "packed"],
)
def test_bfloat16_values_in_heads_of_64_or_128_are_taken_from_ampere_on(change):
    assert refuses_cuda(FITS._replace(**change)) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"device_type": "cpu"}, "it needs CUDA tensors, not cpu"),
        ({"dtype": torch.float32}, "it computes with values in torch.bfloat16, not torch.float32"),
        ({"dtype": torch.float16}, "it computes with values in torch.bfloat16, not torch.float16"),
        ({"head_size": 32}, "it needs head sizes of 64 or 128, not 32"),
        ({"capability": 75}, "it needs a GPU of sm_80 or later, not sm_75"),
    ],
    ids=["cpu", "float32", "float16", "heads", "chip"],
)
def test_all_else_is_refused_with_a_sentence(change, sentence):
    assert refuses_cuda(FITS._replace(**change)) == sentence
