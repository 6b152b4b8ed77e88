"""docs/strategies.md against the code: DeepSpeed's settings, and the bytes of each parameter."""

import re
from pathlib import Path

import pytest

from rwkv_train.errors import ConfigError
from rwkv_train.training.zero_settings import merge_deepspeed_config

PAGE = (Path(__file__).parents[2] / "docs/strategies.md").read_text()
_, _, REFUSED = PAGE.partition("| in the file | here |\n|---|---|\n")
ROWS = [
    (name, re.findall(r"`([\w.]+)`", ours)[0])
    for names, ours in re.findall(r"^\| (.*?) \| (.*?) \|$", REFUSED.partition("\n\n")[0], re.MULTILINE)
    for name in re.findall(r"`([\w.]+)`", names)
]


def nested(name):
    tree = 1
    for key in reversed(name.split(".")):
        tree = {key: tree}
    return tree


@pytest.mark.parametrize(("name", "ours"), ROWS, ids=[name for name, _ in ROWS])
def test_what_the_page_lists_is_refused_with_the_setting_it_names(name, ours):
    with pytest.raises(ConfigError, match=rf"{re.escape(name)} is decided by .*{re.escape(ours)}"):
        merge_deepspeed_config({}, nested(name), "file.json")


def test_the_example_of_the_page_is_accepted():
    import json

    example = json.loads(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL).group(1))
    merged = merge_deepspeed_config({"zero_optimization": {"stage": 2}}, example, "file.json")
    assert merged["zero_optimization"] == {"stage": 2, **example["zero_optimization"]}


def test_the_page_lists_all_that_is_refused():
    from rwkv_train.training import zero_settings

    assert {name for name, _ in ROWS} == set(zero_settings._OURS)
