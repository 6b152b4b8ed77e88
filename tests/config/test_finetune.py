import pytest

from rwkv_train.config.load import list_presets, load_chat_data, load_train_config
from rwkv_train.errors import ConfigError


@pytest.mark.parametrize("name", sorted(list_presets(of_finetuning=True)))
def test_every_shipped_preset_is_valid(name):
    load_chat_data(name)


def test_presets_of_finetuning_are_none_of_pretraining():
    with pytest.raises(ConfigError, match="neither a file nor a preset"):
        load_train_config("data-example")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.ctx_length=8",
            r"data\.ctx_length: no such setting; did you mean 'max_tokens'|there are datasets",
        ),
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
        ("data.datasets=[{path: x}, {path: x}]", "datasets names 'x' twice"),
        ("data.datasets=[{path: x, weight: 0}]", r"weight is 0 but should be greater than 0"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(override, message):
    with pytest.raises(ConfigError, match=message):
        load_chat_data("data-example", [override])
