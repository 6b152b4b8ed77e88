import pytest
from pydantic import ValidationError

from rwkv_train.config.load import check_model
from rwkv_train.config.model import Rwkv4Config, Rwkv7Config, lora_ranks_by_rule
from rwkv_train.errors import ConfigError

# The table of published ranks (w, a, v, g) by width, as the two trainers print them.
PUBLISHED = {
    ("original", 768): (64, 64, 32, 128),
    ("revised", 768): (64, 64, 32, 128),
    ("original", 1024): (64, 64, 32, 160),
    ("revised", 1024): (64, 64, 64, 160),
    ("original", 2048): (96, 96, 64, 256),
    ("revised", 2048): (128, 128, 64, 224),
    ("original", 2560): (96, 96, 64, 320),
    ("revised", 2560): (128, 128, 96, 256),
    ("original", 4096): (128, 128, 96, 480),
    ("revised", 4096): (160, 160, 96, 320),
}


@pytest.mark.parametrize(("key", "ranks"), PUBLISHED.items(), ids=str)
def test_ranks_by_rule_are_the_published_ones(key, ranks):
    rule, n_embd = key
    found = lora_ranks_by_rule(n_embd, rule)
    assert (found.w, found.a, found.v, found.g) == ranks


def test_a_rule_and_explicit_ranks_both_give_ranks():
    by_rule = Rwkv7Config(n_layer=1, n_embd=768, lora_ranks="original")
    explicit = Rwkv7Config.model_validate(
        {"n_layer": 1, "n_embd": 768, "lora_ranks": {"w": 64, "a": 64, "v": 32, "g": 128}}
    )
    assert by_rule.ranks == explicit.ranks


def test_dropout_is_a_setting_of_rwkv4_alone():
    section = {"arch": "rwkv4", "n_layer": 1, "n_embd": 64, "dropout": 0.1}
    assert check_model(section).dropout == 0.1
    with pytest.raises(ConfigError, match=r"model\.dropout: no such setting; only rwkv4 has it"):
        check_model(section | {"arch": "rwkv7"})


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_leaves_something(dropout):
    with pytest.raises(ValidationError, match="dropout"):
        Rwkv4Config(n_layer=1, n_embd=64, dropout=dropout)
