"""The table of what may change on resume, in docs/checkpoints.md, says what the code does."""

import re
from pathlib import Path

import pytest

from rwkv_train.config.checkpoint import CheckpointConfig
from rwkv_train.config.data import DataConfig
from rwkv_train.config.guard import GuardConfig
from rwkv_train.config.instruct import InstructDataConfig
from rwkv_train.config.model import Rwkv4Config, Rwkv7Config
from rwkv_train.config.optim import OptimConfig
from rwkv_train.config.train import TrainConfig
from rwkv_train.config.trainer import TrainerConfig
from rwkv_train.training.resume import MAY_CHANGE, MAY_CHANGE_ON_REQUEST, MAY_CHANGE_WITH_THE_BASE

DOCUMENT = Path(__file__).parents[2] / "docs/checkpoints.md"
FIELDS = {
    "model": {*Rwkv4Config.model_fields, *Rwkv7Config.model_fields},
    "data": {*DataConfig.model_fields, *InstructDataConfig.model_fields},
    "optim": set(OptimConfig.model_fields),
    "trainer": set(TrainerConfig.model_fields),
    "checkpoint": set(CheckpointConfig.model_fields),
    "guard": set(GuardConfig.model_fields),
}


def names_in_table(answer):
    """Settings of the rows whose answer begins so, those of ``section.*`` one by one."""
    _, _, table = DOCUMENT.read_text().partition("| settings | may change |\n|---|---|\n")
    found = set()
    for line in table.partition("\n\n")[0].splitlines():
        settings, answered = line.strip("|").split(" | ")
        if answered.strip().startswith(answer):
            for section, name in re.findall(r"`(\w+)\.([\w*]+)`", settings):
                found |= {f"{section}.{field}" for field in (FIELDS[section] if name == "*" else {name})}
    return found


def names_in_code(table):
    return {f"{section}.{name}" for section, names in table.items() for name in names}


@pytest.mark.parametrize(
    ("answer", "table"),
    [
        ("yes", MAY_CHANGE),
        ("with `--allow-change NAME`", MAY_CHANGE_ON_REQUEST),
        ("where the base stays the same", MAY_CHANGE_WITH_THE_BASE),
    ],
    ids=["freely", "on request", "with the base"],
)
def test_the_table_names_what_may_change(answer, table):
    assert names_in_table(answer) == names_in_code(table)


def test_no_setting_is_both_free_and_on_request():
    assert not names_in_code(MAY_CHANGE) & names_in_code(MAY_CHANGE_ON_REQUEST)


def test_what_may_change_are_settings():
    assert set(FIELDS) == set(TrainConfig.model_fields)
    for table in (MAY_CHANGE, MAY_CHANGE_ON_REQUEST, MAY_CHANGE_WITH_THE_BASE):
        assert names_in_code(table) <= names_in_code(FIELDS)
