import pytest
import yaml

from rwkv_train.config.load import (
    check_finetune_tree,
    fill_sizes,
    list_presets,
    load_chat_data,
    load_train_config,
    read_tree,
)
from rwkv_train.errors import ConfigError

PRESETS = list_presets(of_finetuning=True)
SIZES = {"arch": "rwkv7", "n_layer": 2, "n_embd": 64, "head_size": 32, "vocab_size": 65_536}
RUN = """
model: {arch: rwkv7, n_layer: 2, n_embd: 64, head_size: 32, init_from: base.pth}
data: {datasets: [{path: chats.jsonl}], valid_fraction: 0.1}
finetune: {method: lora}
trainer: {out_dir: run, max_steps: 1, global_batch_size: 8}
"""
PAIRS = {"datasets": [{"path": "pairs.jsonl", "format": "preference"}]}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_data_of_every_shipped_preset_are_valid(name):
    load_chat_data(name)


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"data-example"}))
def test_every_shipped_preset_is_valid_once_the_weights_give_the_sizes(name):
    config = check_finetune_tree(fill_sizes(read_tree(name, of_finetuning=True), SIZES))
    assert config.model.n_layer == 2
    assert config.has_validation
    assert (config.preference is not None) == (name == "dpo")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.init_from": None}, r"model\.init_from must be set"),
        (
            {"finetune": {}},
            r"finetune\.method: it must be set, to 'full', 'freeze', 'lora', 'state' or 'prefix'",
        ),
        ({"finetune": {"method": "bone"}}, r"finetune\.method: there is no 'bone'; use 'full'"),
        ({"finetune.ranks": 4}, r"finetune\.ranks: no such setting; did you mean 'rank'"),
        ({"finetune": {"method": "full", "rank": 4}}, r"finetune\.rank: no such setting"),
        ({"finetune": {"method": "freeze"}}, r"finetune: 'freeze' freezes nothing here"),
        (
            {"finetune": {"method": "lora", "variant": "miss", "alpha": 1.0}},
            "alpha changes nothing .* 'miss'",
        ),
        (
            {"finetune": {"method": "lora", "variant": "dora", "quantize": "nf4"}},
            "variant 'dora' needs the weights",
        ),
        ({"finetune": {"method": "state"}, "trainer.strategy": "fsdp2"}, "method 'state' are needed whole"),
        (
            {"finetune.quantize": "int8", "trainer.strategy": "deepspeed_3"},
            "cannot share out quantized weights",
        ),
        (
            {"finetune.variant": "dora", "trainer.compile": True},
            "compile cannot take finetune.variant 'dora'",
        ),
        (
            {"trainer.compile": True, "trainer.wkv_backend": "reference"},
            "cannot take trainer.wkv_backend 'reference'",
        ),
        ({"data.valid": [{"path": "v.jsonl"}]}, "valid and valid_fraction .* both say what is held out"),
        (
            {"data.valid_fraction": None, "prompts": ["Hi"]},
            "prompts are answered at each validation, and nothing",
        ),
        ({"prompts": ["Hi"], "trainer.sample_tokens": 0}, "prompts need trainer.sample_tokens above 0"),
        ({"trainer.sample_prompt": "Hi"}, "trainer.sample_prompt is of pretraining; set prompts"),
        (
            {"data.valid_fraction": None, "trainer.early_stopping_patience": 1},
            "needs held-out data; set data.valid",
        ),
        (
            {
                "data.datasets": [{"path": "a"}, {"path": "b"}],
                "trainer.max_steps": None,
                "trainer.max_epochs": 1.0,
            },
            r"trainer\.max_epochs \(1\) has no meaning with several datasets",
        ),
        ({"preference": {"loss": "dpo"}, "optim.l2wrap": 0.0}, "'chats.jsonl' of format 'messages'"),
        ({"data": PAIRS}, "of format 'preference', and the section preference is not set"),
        ({"data": PAIRS, "preference": {}, "optim.l2wrap": 1e-4}, r"optim\.l2wrap \(0\.0001\) is a penalty"),
        (
            {"data": PAIRS, "preference": {"loss": "orpo", "gamma": 1.0}},
            r"gamma \(1\) does nothing with the loss 'orpo'",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_way_out(changes, message):
    tree = yaml.safe_load(RUN)
    for name, value in changes.items():
        section, _, key = name.partition(".")
        if not key:
            tree[section] = value
        elif value is None:
            del tree[section][key]
        else:
            tree.setdefault(section, {})[key] = value
    with pytest.raises(ConfigError, match=message):
        check_finetune_tree(tree)


def test_each_preference_loss_has_its_own_defaults():
    tree = yaml.safe_load(RUN) | {"data": PAIRS, "optim": {"l2wrap": 0.0}}
    found = {
        loss: check_finetune_tree({**tree, "preference": {"loss": loss}}).preference
        for loss in ("dpo", "orpo", "simpo")
    }
    assert [(one.beta, one.label_smoothing, one.gamma) for one in found.values()] == [
        (0.1, 0.0, None),
        (0.1, None, None),
        (2.0, None, 0.5),
    ]


def test_presets_of_finetuning_are_none_of_pretraining():
    with pytest.raises(ConfigError, match="neither a file nor a preset"):
        load_train_config("data-example")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.ctx_length=8", r"data\.ctx_length: no such setting; there are datasets, valid"),
        ("data.datasets=[]", r"data\.datasets is \[\] but "),
        ("data.learn=user", r"data\.learn is 'user' but should be 'assistant' or 'all'"),
        ("data.learn={role: [user]}", r"data\.learn\.role: no such setting; did you mean 'roles'"),
        ("data.learn={roles: [bot]}", r"data\.learn\.roles\.0 is 'bot' but should be 'system'"),
        ("data.datasets=[{path: x, format: alpaka}]", r"data\.datasets\.0\.format is 'alpaka' but "),
        (
            "data.datasets=[{path: x, fields: {turns: y}}]",
            "fields names 'turns', which .* it has messages, role",
        ),
        (
            "data.datasets=[{path: x, format: text, roles: {a: user}}]",
            "roles changes nothing for the format 'text'",
        ),
        ("data.datasets=[{path: x, split: valid}]", "split changes nothing for the path 'x'"),
        (
            "data.datasets=[{path: 'hf:x', file_format: csv}]",
            "file_format changes nothing for the path 'hf:x'",
        ),
        (
            "data.datasets=[{path: builtin, fields: {role: y}}]",
            "fields changes nothing for the path 'builtin'",
        ),
        (
            "data.datasets=[{path: builtin, format: text}]",
            "format must be 'messages' or 'preference' for the built-in dataset",
        ),
        (
            "data.datasets=[{path: x, format: preference}, {path: y}]",
            "'y' has the format 'messages' and 'x' the format 'preference'; pairs .* cannot stand beside",
        ),
        (
            "data={datasets: [{path: x}], valid: [{path: y, format: preference}]}",
            "'y' has the format 'preference' and 'x' the format 'messages'",
        ),
        (
            "data={datasets: [{path: x, format: preference}], learn: all}",
            "learn changes nothing for the format 'preference'",
        ),
        (
            "data={datasets: [{path: x, format: text}], learn: all}",
            "learn changes nothing for the format 'text'",
        ),
        ("data.datasets=[{path: x}, {path: x}]", "datasets names 'x' twice"),
        ("data={datasets: [{path: x}], valid: [{path: x}]}", "valid names 'x', which datasets names too"),
        (
            "data={datasets: [{path: x}], valid: [{path: y, weight: 2}]}",
            r"the weight \(2\) of 'y' changes nothing",
        ),
        ("data.datasets=[{path: x, weight: 0}]", r"weight is 0 but should be greater than 0"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(override, message):
    with pytest.raises(ConfigError, match=message):
        load_chat_data("data-example", [override])
