"""Learning rates and weight decay of every parameter, against the published recipe written out by hand."""

import pytest

from rwkv_train.config.model import LoraRanks, Rwkv4Config, Rwkv5Config, Rwkv6Config, Rwkv7Config
from rwkv_train.config.optim import OptimConfig
from rwkv_train.models.registry import build_model
from rwkv_train.training.param_groups import parameter_groups

OPTIM = OptimConfig(lr=1e-3, lr_final=1e-4, weight_decay=0.1)
RANKS = LoraRanks(w=8, a=8, v=8, g=8)
V7 = Rwkv7Config(n_layer=2, n_embd=64, head_size=32, vocab_size=50, lora_ranks=RANKS)
V6 = Rwkv6Config(n_layer=2, n_embd=64, head_size=32, vocab_size=50)
V5 = Rwkv5Config(n_layer=2, n_embd=64, head_size=32, vocab_size=50)
V4 = Rwkv4Config(n_layer=2, n_embd=64, vocab_size=50)

PLAIN, MATRIX = (1.0, False), (1.0, True)  # factor of the learning rate, whether it decays
NORMS = {f"{norm}.{kind}": PLAIN for norm in ("ln1", "ln2") for kind in ("weight", "bias")}
AROUND = {
    "emb.weight": MATRIX,
    "head.weight": MATRIX,
    "blocks.0.ln0.weight": PLAIN,
    "blocks.0.ln0.bias": PLAIN,
    "ln_out.weight": PLAIN,
    "ln_out.bias": PLAIN,
}
# RWKV-LM, RWKV-v7/train_temp: att.w0 at twice the rate; matrices named ".weight" decay; nothing else does.
V7_BLOCK = NORMS | {
    "att.x_r": PLAIN,
    "att.x_w": PLAIN,
    "att.x_k": PLAIN,
    "att.x_v": PLAIN,
    "att.x_a": PLAIN,
    "att.x_g": PLAIN,
    "att.w0": (2.0, False),
    "att.w1": PLAIN,
    "att.w2": PLAIN,
    "att.a0": PLAIN,
    "att.a1": PLAIN,
    "att.a2": PLAIN,
    "att.v0": PLAIN,
    "att.v1": PLAIN,
    "att.v2": PLAIN,
    "att.g1": PLAIN,
    "att.g2": PLAIN,
    "att.k_k": PLAIN,
    "att.k_a": PLAIN,
    "att.r_k": PLAIN,
    "att.receptance.weight": MATRIX,
    "att.key.weight": MATRIX,
    "att.value.weight": MATRIX,
    "att.output.weight": MATRIX,
    "att.ln_x.weight": PLAIN,
    "att.ln_x.bias": PLAIN,
    "ffn.x_k": PLAIN,
    "ffn.key.weight": MATRIX,
    "ffn.value.weight": MATRIX,
}
V7_UNUSED = {f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")}
# RWKV-LM, RWKV-v4neo: time_decay at twice, time_first at three times the rate; matrices decay, if any do.
V4_BLOCK = NORMS | {
    "att.time_decay": (2.0, False),
    "att.time_first": (3.0, False),
    "att.time_mix_k": PLAIN,
    "att.time_mix_v": PLAIN,
    "att.time_mix_r": PLAIN,
    "att.key.weight": MATRIX,
    "att.value.weight": MATRIX,
    "att.receptance.weight": MATRIX,
    "att.output.weight": MATRIX,
    "ffn.time_mix_k": PLAIN,
    "ffn.time_mix_r": PLAIN,
    "ffn.key.weight": MATRIX,
    "ffn.receptance.weight": MATRIX,
    "ffn.value.weight": MATRIX,
}
# RWKV-LM, RWKV-v5: time_decay at twice the rate; matrices named ".weight" decay; nothing else does.
V5_AND_6_BLOCK = NORMS | {
    "att.time_decay": (2.0, False),
    "att.time_faaaa": PLAIN,
    "att.receptance.weight": MATRIX,
    "att.key.weight": MATRIX,
    "att.value.weight": MATRIX,
    "att.gate.weight": MATRIX,
    "att.output.weight": MATRIX,
    "att.ln_x.weight": PLAIN,
    "att.ln_x.bias": PLAIN,
    "ffn.key.weight": MATRIX,
    "ffn.receptance.weight": MATRIX,
    "ffn.value.weight": MATRIX,
}
V5_BLOCK = V5_AND_6_BLOCK | {
    "att.time_mix_k": PLAIN,
    "att.time_mix_v": PLAIN,
    "att.time_mix_r": PLAIN,
    "att.time_mix_g": PLAIN,
    "ffn.time_mix_k": PLAIN,
    "ffn.time_mix_r": PLAIN,
}
V6_BLOCK = V5_AND_6_BLOCK | {
    "att.time_maa_x": PLAIN,
    "att.time_maa_w": PLAIN,
    "att.time_maa_k": PLAIN,
    "att.time_maa_v": PLAIN,
    "att.time_maa_r": PLAIN,
    "att.time_maa_g": PLAIN,
    "att.time_maa_w1": PLAIN,
    "att.time_maa_w2": PLAIN,
    "att.time_decay_w1": PLAIN,
    "att.time_decay_w2": PLAIN,
    "ffn.time_maa_k": PLAIN,
    "ffn.time_maa_r": PLAIN,
}
ALL = pytest.mark.parametrize("config", [V4, V5, V6, V7], ids=["rwkv4", "rwkv5", "rwkv6", "rwkv7"])


def of_model(block, unused=frozenset()):
    layers = {f"blocks.{layer}.{name}": wanted for layer in range(2) for name, wanted in block.items()}
    return {name: wanted for name, wanted in (AROUND | layers).items() if name not in unused}


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (V4, of_model(V4_BLOCK)),
        (V5, of_model(V5_BLOCK)),
        (V6, of_model(V6_BLOCK)),
        (V7, of_model(V7_BLOCK, V7_UNUSED)),
    ],
    ids=["rwkv4", "rwkv5", "rwkv6", "rwkv7"],
)
def test_every_trained_parameter_learns_and_decays_as_published(config, published):
    groups = parameter_groups(build_model(config), config.arch, OPTIM)
    pairs = [(name, (g["lr_factor"], g["has_weight_decay"])) for g in groups for name in g["names"]]
    assert len(pairs) == len(dict(pairs))
    assert dict(pairs) == published


@ALL
def test_a_group_starts_with_the_rates_of_its_kind(config):
    groups = parameter_groups(build_model(config), config.arch, OPTIM)
    for group in groups:
        assert group["lr"] == 1e-3 * group["lr_factor"]
        assert group["weight_decay"] == (0.1 if group["has_weight_decay"] else 0.0)


@ALL
def test_names_stand_beside_their_parameters(config):
    model = build_model(config)
    for group in parameter_groups(model, config.arch, OPTIM):
        assert [id(model.get_parameter(name)) for name in group["names"]] == [id(p) for p in group["params"]]


def test_weight_decay_depends_on_names_alone():
    # ZeRO-3 leaves empty tensors in the place of parameters.
    model = build_model(V7)
    for parameter in model.parameters():
        parameter.data = parameter.new_empty(0)
    groups = parameter_groups(model, "rwkv7", OPTIM)
    decaying = {name for group in groups if group["has_weight_decay"] for name in group["names"]}
    assert decaying == {name for name, kind in of_model(V7_BLOCK).items() if kind == MATRIX}
