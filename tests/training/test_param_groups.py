import pytest

from rwkv_train.config.model import LoraRanks, Rwkv4Config, Rwkv7Config
from rwkv_train.config.optim import OptimConfig
from rwkv_train.models.registry import build_model
from rwkv_train.training.param_groups import parameter_groups

OPTIM = OptimConfig(lr=1e-3, lr_final=1e-4, weight_decay=0.1)
RANKS = LoraRanks(w=8, a=8, v=8, g=8)
V7 = Rwkv7Config(n_layer=2, n_embd=64, head_size=32, vocab_size=50, lora_ranks=RANKS)
V4 = Rwkv4Config(n_layer=2, n_embd=64, vocab_size=50)


def settings_by_name(config):
    groups = parameter_groups(build_model(config), config.arch, OPTIM)
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


@pytest.mark.parametrize(
    ("name", "lr", "decay"),
    [
        ("emb.weight", 1e-3, 0.1),
        ("head.weight", 1e-3, 0.1),
        ("blocks.1.att.receptance.weight", 1e-3, 0.1),
        ("blocks.1.ffn.value.weight", 1e-3, 0.1),
        ("blocks.1.att.w0", 2e-3, 0.0),
        ("blocks.0.att.w1", 1e-3, 0.0),
        ("blocks.0.att.r_k", 1e-3, 0.0),
        ("blocks.0.att.x_r", 1e-3, 0.0),
        ("blocks.0.att.ln_x.weight", 1e-3, 0.0),
        ("blocks.0.ln0.bias", 1e-3, 0.0),
        ("ln_out.weight", 1e-3, 0.0),
    ],
)
def test_rwkv7_learns_and_decays_as_published(name, lr, decay):
    assert settings_by_name(V7)[name] == (lr, decay)


@pytest.mark.parametrize(
    ("name", "lr", "decay"),
    [
        ("emb.weight", 1e-3, 0.1),
        ("blocks.1.att.key.weight", 1e-3, 0.1),
        ("blocks.1.att.time_decay", 2e-3, 0.0),
        ("blocks.1.att.time_first", 3e-3, 0.0),
        ("blocks.1.att.time_mix_k", 1e-3, 0.0),
        ("blocks.1.ffn.time_mix_r", 1e-3, 0.0),
        ("blocks.1.ln2.weight", 1e-3, 0.0),
    ],
)
def test_rwkv4_learns_and_decays_as_published(name, lr, decay):
    assert settings_by_name(V4)[name] == (lr, decay)


@pytest.mark.parametrize("config", [V4, V7], ids=["rwkv4", "rwkv7"])
def test_every_trained_parameter_is_in_exactly_one_group(config):
    model = build_model(config)
    groups = parameter_groups(model, config.arch, OPTIM)
    names = [name for group in groups for name in group["names"]]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sorted(names) == sorted(trained)
