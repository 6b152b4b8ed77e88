"""Which layers get an adapter, and of which rank."""

import pytest

from rwkv_train.config.load import check_finetune_tree
from rwkv_train.errors import ConfigError
from rwkv_train.finetuning.adapters import inject_adapter
from rwkv_train.finetuning.targets import find_targets
from tests.finetuning.adapter_models import MODELS, base_model, method_of

LAYERS = {
    "rwkv4": {"att": {"receptance", "key", "value", "output"}, "ffn": {"key", "receptance", "value"}},
    "rwkv5": {"att": {"receptance", "key", "value", "gate", "output"}, "ffn": {"key", "receptance", "value"}},
    "rwkv6": {"att": {"receptance", "key", "value", "gate", "output"}, "ffn": {"key", "receptance", "value"}},
    "rwkv7": {"att": {"receptance", "key", "value", "output"}, "ffn": {"key", "value"}},
}


@pytest.mark.parametrize("arch", MODELS)
def test_by_default_every_linear_layer_of_both_mixes_has_one(arch):
    wanted = {
        f"blocks.{i}.{mix}.{name}" for i in (0, 1) for mix in LAYERS[arch] for name in LAYERS[arch][mix]
    }
    assert find_targets(base_model(arch), method_of()).keys() == wanted


def test_the_last_pattern_that_fits_counts():
    targets = find_targets(
        base_model(),
        method_of(
            targets=["blocks.1.att.key", "*.ffn.*"],
            rank_pattern={"blocks.1.*": 8, "*.key": 2},
            alpha_pattern={"*.key": 3.0, "*.ffn.key": 5.0},
        ),
    )
    assert {name: (target.rank, target.alpha) for name, target in targets.items()} == {
        "blocks.0.ffn.key": (2, 5.0),
        "blocks.0.ffn.value": (4, 32.0),
        "blocks.1.att.key": (2, 3.0),
        "blocks.1.ffn.key": (2, 5.0),
        "blocks.1.ffn.value": (8, 32.0),
    }


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa", "miss"])
def test_what_is_counted_is_what_learns(variant):
    model, method = base_model(), method_of(variant=variant)
    counted = sum(target.count_parameters(method) for target in find_targets(model, method).values())
    inject_adapter(model, method, seed=0)
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"targets": ["*.att.*", "blocks.*.att.kay"]},
            r"targets: 'blocks\.\*\.att\.kay' fits no linear layer; near it are blocks\.\d\.att\.key",
        ),
        ({"targets": ["blocks.0.att.w1"]}, r"targets: 'blocks\.0\.att\.w1' fits no linear layer"),
        ({"targets": ["emb"]}, r"targets: 'emb' fits no linear layer"),
        (
            {"targets": ["*.att.*"], "rank_pattern": {"*.ffn.key": 2}},
            r"rank_pattern: '\*\.ffn\.key' fits no layer of finetune\.targets; near it are ",
        ),
        ({"alpha_pattern": {"blocks.7.*": 2.0}}, r"alpha_pattern: 'blocks\.7\.\*' fits no layer of "),
        (
            {"rank": 33},
            r"rank \(33\) is too large for blocks\.0\.att\.receptance, .* can have at most 32 there",
        ),
        (
            {"rank_pattern": {"*.1.ffn.key": 40}},
            r"rank \(40\) is too large for blocks\.1\.ffn\.key, a layer of 32 inputs and 128 outputs",
        ),
        ({"variant": "miss", "rank": 33}, r"rank .* 'miss' can have at most 32 there"),
    ],
    ids=["near", "no-layer", "embedding", "rank-pattern", "alpha-pattern", "rank", "rank-of-one", "miss"],
)
def test_what_fits_no_layer_is_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=rf"finetune\.{message}"):
        find_targets(base_model(), method_of(**settings))


def test_miss_has_one_rank():
    tree = {"finetune": {"method": "lora", "variant": "miss", "rank_pattern": {"*.key": 3}}}
    with pytest.raises(ConfigError, match="'miss' has one rank for all layers; leave rank_pattern out"):
        check_finetune_tree(tree)
