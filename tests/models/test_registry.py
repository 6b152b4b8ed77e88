import pytest
import torch

from rwkv_train.config.model import LoraRanks, Rwkv4Config, Rwkv7Config
from rwkv_train.models.registry import (
    ARCHITECTURES,
    build_model,
    count_parameters,
    has_weight_decay,
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
    [(tiny_rwkv7, MATRICES), (tiny_rwkv4, (*MATRICES, "ffn.receptance"))],
    ids=["rwkv7", "rwkv4"],
)
def test_only_the_matrices_of_linear_layers_and_the_embedding_decay(make, matrices):
    decaying = {name for name, _ in make().named_parameters() if has_weight_decay(name)}
    expected = {f"blocks.{i}.{name}.weight" for i in range(L) for name in matrices}
    assert decaying == expected | {"emb.weight", "head.weight"}


@pytest.mark.parametrize(
    ("make", "arch", "faster"),
    [
        (tiny_rwkv7, "rwkv7", {"att.w0": 2}),
        (tiny_rwkv4, "rwkv4", {"att.time_decay": 2, "att.time_first": 3}),
    ],
    ids=["rwkv7", "rwkv4"],
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
    model = {"rwkv4": tiny_rwkv4, "rwkv7": tiny_rwkv7}[arch]()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == unused_parameters(arch)


def test_the_unused_parameters_are_the_first_value_residual_of_rwkv7():
    assert unused_parameters("rwkv7") == {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}
    assert not unused_parameters("rwkv4")


def test_loading_keeps_what_is_frozen(config):
    source, target = build_model(config), build_model(config, device="meta")
    target.load_state_dict(source.state_dict(), assign=True)
    assert [p.requires_grad for p in target.parameters()] == [p.requires_grad for p in source.parameters()]
    assert isinstance(target.emb.weight, torch.nn.Parameter)
