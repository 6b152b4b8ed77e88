import subprocess
import sys

import pytest
import torch

from rwkv_train.config.model import LoraRanks, Rwkv4Config, Rwkv5Config, Rwkv6Config, Rwkv6Ranks, Rwkv7Config
from rwkv_train.errors import ConfigError
from rwkv_train.models.registry import (
    ARCHITECTURES,
    build_model,
    count_parameters,
    has_weight_decay,
    initialize,
    learning_rate_factors,
    unused_parameters,
)

V, C, L, N = 50, 24, 2, 8
RANKS = {"w": 2, "a": 3, "v": 4, "g": 5}


def tiny_rwkv7():
    return build_model(
        Rwkv7Config(n_layer=L, n_embd=C, head_size=N, vocab_size=V, lora_ranks=LoraRanks(**RANKS))
    )


def tiny_rwkv4():
    return build_model(Rwkv4Config(n_layer=L, n_embd=C, vocab_size=V))


def tiny_rwkv5(version="5.2", **settings):
    return build_model(
        Rwkv5Config(n_layer=L, n_embd=C, head_size=N, vocab_size=V, version=version, **settings)
    )


def tiny_rwkv6():
    return build_model(
        Rwkv6Config(n_layer=L, n_embd=C, head_size=N, vocab_size=V, lora_ranks=Rwkv6Ranks(shift=2, decay=3))
    )


TINY = {"rwkv4": tiny_rwkv4, "rwkv5": tiny_rwkv5, "rwkv6": tiny_rwkv6, "rwkv7": tiny_rwkv7}


def published_shapes(block):
    """Names and shapes of a published file whose blocks have ``block``."""
    norms = {f"{ln}.{kind}": (C,) for ln in ("ln1", "ln2") for kind in ("weight", "bias")}
    layers = {f"blocks.{i}.{name}": shape for i in range(L) for name, shape in (block | norms).items()}
    return layers | {
        "emb.weight": (V, C),
        "blocks.0.ln0.weight": (C,),
        "blocks.0.ln0.bias": (C,),
        "ln_out.weight": (C,),
        "ln_out.bias": (C,),
        "head.weight": (V, C),
    }


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_rwkv7_has_the_names_and_shapes_of_published_files():
    vectors = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a")
    block = {f"att.{name}": (1, 1, C) for name in vectors}
    block |= {f"att.{name}1": (C, rank) for name, rank in RANKS.items()}
    block |= {f"att.{name}2": (rank, C) for name, rank in RANKS.items()}
    block |= {f"att.{name}.weight": (C, C) for name in ("receptance", "key", "value", "output")}
    block |= {"att.r_k": (C // N, N), "att.ln_x.weight": (C,), "att.ln_x.bias": (C,)}
    block |= {"ffn.x_k": (1, 1, C), "ffn.key.weight": (4 * C, C), "ffn.value.weight": (C, 4 * C)}
    assert shapes(tiny_rwkv7()) == published_shapes(block)


def test_rwkv4_has_the_names_and_shapes_of_published_files():
    block = {f"att.time_mix_{name}": (1, 1, C) for name in "kvr"}
    block |= {f"ffn.time_mix_{name}": (1, 1, C) for name in "kr"}
    block |= {"att.time_decay": (C,), "att.time_first": (C,)}
    block |= {f"att.{name}.weight": (C, C) for name in ("receptance", "key", "value", "output")}
    block |= {"ffn.key.weight": (4 * C, C), "ffn.value.weight": (C, 4 * C), "ffn.receptance.weight": (C, C)}
    assert shapes(tiny_rwkv4()) == published_shapes(block)


FFN = 64
"""3.5 times 24 is 84: two times 32 and a rest."""


@pytest.mark.parametrize(
    ("version", "bonus"),
    [("5.2", "time_faaaa"), ("5.1", "time_faaaa"), ("5.1", "time_first"), ("5.0", "time_first")],
)
def test_rwkv5_has_the_names_and_shapes_of_published_files(version, bonus):
    mixes = "kvr" if version == "5.0" else "kvrg"
    matrices = ("receptance", "key", "value", "output", *(() if version == "5.0" else ("gate",)))
    of_decay = (C // N, N) if version == "5.2" else (C // N,)
    block = {f"att.time_mix_{name}": (1, 1, C) for name in mixes}
    block |= {f"ffn.time_mix_{name}": (1, 1, C) for name in "kr"}
    block |= {"att.time_decay": of_decay, f"att.{bonus}": of_decay}
    block |= {f"att.{name}.weight": (C, C) for name in matrices}
    block |= {"att.ln_x.weight": (C,), "att.ln_x.bias": (C,)}
    block |= {"ffn.key.weight": (FFN, C), "ffn.value.weight": (C, FFN), "ffn.receptance.weight": (C, C)}
    assert shapes(tiny_rwkv5(version, bonus=bonus)) == published_shapes(block)


def test_rwkv6_has_the_names_and_shapes_of_published_files():
    block = {f"att.time_maa_{name}": (1, 1, C) for name in "xwkvrg"}
    block |= {f"ffn.time_maa_{name}": (1, 1, C) for name in "kr"}
    block |= {"att.time_maa_w1": (C, 5 * 2), "att.time_maa_w2": (5, 2, C)}
    block |= {"att.time_decay": (1, 1, C), "att.time_decay_w1": (C, 3), "att.time_decay_w2": (3, C)}
    block |= {"att.time_faaaa": (C // N, N)}
    block |= {f"att.{name}.weight": (C, C) for name in ("receptance", "key", "value", "output", "gate")}
    block |= {"att.ln_x.weight": (C,), "att.ln_x.bias": (C,)}
    block |= {"ffn.key.weight": (FFN, C), "ffn.value.weight": (C, FFN), "ffn.receptance.weight": (C, C)}
    assert shapes(tiny_rwkv6()) == published_shapes(block)


@pytest.mark.parametrize("version", ["5.0", "5.1"])
def test_versions_without_published_initial_values_cannot_be_initialized(version):
    with pytest.raises(ConfigError, match=rf"model\.version is '{version}', but .* start from weights"):
        initialize(tiny_rwkv5(version), seed=0)


def test_a_new_model_is_zero_until_it_is_initialized_or_loaded(config):
    assert not any(parameter.any() for parameter in build_model(config).parameters())


def test_a_model_can_be_built_without_memory(config):
    model = build_model(config, device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_counting_needs_no_model(config):
    assert count_parameters(config) == sum(
        value.numel() for value in build_model(config).state_dict().values()
    )


MATRICES = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")


@pytest.mark.parametrize(
    ("make", "matrices"),
    [
        (tiny_rwkv7, MATRICES),
        (tiny_rwkv6, (*MATRICES, "ffn.receptance", "att.gate")),
        (tiny_rwkv5, (*MATRICES, "ffn.receptance", "att.gate")),
        (tiny_rwkv4, (*MATRICES, "ffn.receptance")),
    ],
    ids=["rwkv7", "rwkv6", "rwkv5", "rwkv4"],
)
def test_only_the_matrices_of_linear_layers_and_the_embedding_decay(make, matrices):
    decaying = {name for name, _ in make().named_parameters() if has_weight_decay(name)}
    expected = {f"blocks.{i}.{name}.weight" for i in range(L) for name in matrices}
    assert decaying == expected | {"emb.weight", "head.weight"}


@pytest.mark.parametrize(
    ("make", "arch", "faster"),
    [
        (tiny_rwkv7, "rwkv7", {"att.w0": 2}),
        (tiny_rwkv6, "rwkv6", {"att.time_decay": 2}),
        (tiny_rwkv5, "rwkv5", {"att.time_decay": 2}),
        (
            lambda: tiny_rwkv5("5.0", bonus="time_first"),
            "rwkv5",
            {"att.time_decay": 2, "att.time_first": 3},
        ),
        (tiny_rwkv4, "rwkv4", {"att.time_decay": 2, "att.time_first": 3}),
    ],
    ids=["rwkv7", "rwkv6", "rwkv5.2", "rwkv5.0", "rwkv4"],
)
def test_decays_learn_faster(make, arch, faster):
    names = [name for name, _ in make().named_parameters()]
    found = {
        name: factor
        for suffix, factor in learning_rate_factors(arch).items()
        for name in names
        if name.endswith(suffix)
    }
    assert found == {f"blocks.{i}.{suffix}": factor for i in range(L) for suffix, factor in faster.items()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_exactly_the_unused_parameters_ask_for_no_gradient(arch):
    model = TINY[arch]()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == unused_parameters(arch)


def test_the_unused_parameters_are_the_first_value_residual_of_rwkv7():
    assert unused_parameters("rwkv7") == {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}
    assert not any(unused_parameters(arch) for arch in ("rwkv4", "rwkv5", "rwkv6"))


def test_loading_keeps_what_is_frozen(config):
    source, target = build_model(config), build_model(config, device="meta")
    target.load_state_dict(source.state_dict(), assign=True)
    assert [p.requires_grad for p in target.parameters()] == [p.requires_grad for p in source.parameters()]
    assert isinstance(target.emb.weight, torch.nn.Parameter)


def test_a_model_computes_without_the_compiler_of_pytorch_being_loaded():
    """Which takes a second of every start, and few commands compile."""
    script = """
import sys, torch
from rwkv_train.config.model import Rwkv7Config
from rwkv_train.models.registry import build_model, initialize
model = build_model(Rwkv7Config(n_layer=1, n_embd=64, vocab_size=9))
initialize(model, 0)
model(torch.zeros(1, 3, dtype=torch.long)).logits.sum().backward()
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
