import pytest
from pydantic import ValidationError

from rwkv_train.config.data import DataConfig
from rwkv_train.config.load import check_tree
from rwkv_train.config.save import to_tree
from rwkv_train.data.sampler import ORDERS
from rwkv_train.errors import ConfigError

TWO = [{"path": "a", "weight": 3}, {"path": "b", "weight": 0.5}]


def settings(data, **trainer):
    model = {"arch": "rwkv4", "n_layer": 1, "n_embd": 8, "vocab_size": 300}
    return check_tree({"model": model, "data": data, "trainer": {"out_dir": "run", **trainer}})


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_the_sampler_is_a_setting(order):
    assert DataConfig(order=order).order == order


def test_an_unknown_order_is_refused():
    with pytest.raises(ValidationError, match="'shuffled', 'sequential' or 'official'"):
        DataConfig(order="random")


@pytest.mark.parametrize(
    ("data", "paths"),
    [
        ({}, ["builtin"]),
        ({"train": "a"}, ["a"]),
        ({"train": TWO}, ["a", "b"]),
        ({"streaming": {"path": "x"}}, []),
    ],
    ids=["default", "prefix", "mixture", "stream"],
)
def test_a_run_reads_one_corpus_several_or_a_stream(data, paths):
    config = settings(data, max_steps=1)
    assert config.data.train_paths == paths
    assert check_tree(to_tree(config)) == config  # as a checkpoint stores it


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            {"streaming": {"path": "x"}, "train": "a"},
            "set train to null to read the stream, or streaming to null",
        ),
        ({"train": None}, "set train .* or streaming .*; found neither"),
        ({"streaming": {"path": "x"}, "order": "official"}, "order 'official' needs a prepared corpus"),
        (
            {"streaming": {"path": "x", "shuffle_bufer": 1}},
            r"data\.streaming\.shuffle_bufer: .* 'shuffle_buffer'",
        ),
        ({"train": []}, r"data\.train is \[\] but .* at least 1 item"),
        ({"train": [*TWO, TWO[0]]}, "train names 'a' 2 times; name it once"),
        (
            {"train": [{"path": "a", "weight": 0}]},
            r"data\.train\.0\.weight is 0 but should be greater than 0",
        ),
        ({"train": [TWO[0], {"path": "b"}]}, r"data\.train\.1\.weight: it must be set"),
        ({"train": ["a"]}, r"data\.train\.0 is 'a' but must be a section of settings"),
        ({"train": 5}, r"data\.train is 5 but should be a valid string"),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_way_out(data, sentence):
    with pytest.raises(ConfigError, match=sentence):
        settings(data, max_steps=1)


@pytest.mark.parametrize(
    ("data", "found"),
    [({"train": TWO}, "several corpora in data.train"), ({"streaming": {"path": "x"}}, "data.streaming")],
)
def test_epochs_need_one_corpus(data, found):
    with pytest.raises(
        ConfigError, match=rf"max_epochs \(2\) has no meaning with {found}; set trainer.max_steps"
    ):
        settings(data, max_epochs=2.0)


def test_patience_needs_validation():
    with pytest.raises(ConfigError, match=r"early_stopping_patience \(3\) needs .*; set data\.valid, or"):
        settings({"valid": None}, max_steps=1, early_stopping_patience=3)


def test_a_loop_over_documents_is_not_compiled():
    with pytest.raises(ConfigError, match=r"compile cannot take .*'reference' with data\.documents 'reset'"):
        settings({"documents": "reset"}, max_steps=1, compile=True, wkv_backend="reference")
    settings({"documents": "reset"}, max_steps=1, compile=True)
