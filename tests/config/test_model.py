import pytest
from pydantic import ValidationError

from rwkv_train.config.load import check_model, check_tree
from rwkv_train.config.model import Rwkv4Config, Rwkv5Config, Rwkv6Config, Rwkv7Config, lora_ranks_by_rule
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


@pytest.mark.parametrize("arch", ["rwkv4", "rwkv5", "rwkv6"])
def test_dropout_is_a_setting_of_the_older_versions(arch):
    section = {"arch": arch, "n_layer": 1, "n_embd": 64, "dropout": 0.1}
    assert check_model(section).dropout == 0.1
    sentence = r"model\.dropout: no such setting; only rwkv4, rwkv5 and rwkv6 have it"
    with pytest.raises(ConfigError, match=sentence):
        check_model(section | {"arch": "rwkv7"})


# floor(3.5 C / 32) * 32, the published formula, by hand.
@pytest.mark.parametrize("kind", [Rwkv5Config, Rwkv6Config])
@pytest.mark.parametrize(("n_embd", "ffn_width"), [(2048, 7168), (4096, 14336), (24, 64), (72, 224), (8, 32)])
def test_the_ffn_width_is_the_published_one_unless_it_is_set(kind, n_embd, ffn_width):
    sizes = {"n_layer": 1, "n_embd": n_embd, "head_size": 8}
    assert kind(**sizes).ffn_width == ffn_width
    assert kind(**sizes, ffn_width=100).ffn_width == 100


def test_a_wrong_width_is_the_only_problem_that_is_told():
    with pytest.raises(ConfigError) as caught:
        check_model({"arch": "rwkv6", "n_layer": 1, "n_embd": 0})
    assert str(caught.value) == "model.n_embd is 0 but should be greater than 0"


@pytest.mark.parametrize("arch", ["rwkv5", "rwkv6", "rwkv7"])
def test_heads_fill_the_width(arch):
    with pytest.raises(ConfigError, match=r"n_embd \(100\) must be a multiple of head_size \(64\)"):
        check_model({"arch": arch, "n_layer": 1, "n_embd": 100})


def test_rwkv5_2_has_its_bonus_under_one_name():
    with pytest.raises(ConfigError, match=r"bonus is 'time_first', but version '5\.2' has 'time_faaaa'"):
        check_model({"arch": "rwkv5", "n_layer": 1, "n_embd": 64, "bonus": "time_first"})


@pytest.mark.parametrize("version", ["5.0", "5.1"])
def test_older_rwkv5_is_trained_from_weights_alone(version):
    model = {"arch": "rwkv5", "n_layer": 1, "n_embd": 64, "version": version}
    tree = {"model": model, "trainer": {"max_steps": 1, "out_dir": "run"}}
    sentence = (
        rf"model\.version is '{version}', but initial values are published for '5\.2'.*model\.init_from"
    )
    with pytest.raises(ConfigError, match=sentence):
        check_tree(tree)
    assert check_tree({**tree, "model": {**model, "init_from": "x.pth"}}).model.version == version


def test_every_version_tells_the_same_facts():
    sizes = {"n_layer": 1, "n_embd": 128}
    facts = {
        config.version: (config.n_head, config.head_size, config.ffn_width, config.low_ranks)
        for config in (
            Rwkv4Config(**sizes),
            Rwkv5Config(**sizes),
            Rwkv6Config(**sizes),
            Rwkv7Config(**sizes, lora_ranks="original"),
        )
    }
    assert facts == {
        "4": (None, None, 512, {}),
        "5.2": (2, 64, 448, {}),
        "6": (2, 64, 448, {"shift": 32, "decay": 64}),
        "7": (2, 64, 512, {"w": 32, "a": 32, "v": 32, "g": 32}),
    }


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_leaves_something(dropout):
    with pytest.raises(ValidationError, match="dropout"):
        Rwkv4Config(n_layer=1, n_embd=64, dropout=dropout)


@pytest.mark.parametrize(("written", "version"), [(5.0, "5.0"), (5.1, "5.1"), ("5.2", "5.2")])
def test_a_version_may_be_written_as_a_number(written, version):
    assert Rwkv5Config(n_layer=1, n_embd=64, version=written).version == version
