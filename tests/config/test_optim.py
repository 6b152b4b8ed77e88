import pytest
from pydantic import ValidationError

from rwkv_train.config.load import load_train_config
from rwkv_train.config.optim import OptimConfig
from rwkv_train.config.save import to_tree
from rwkv_train.errors import ConfigError

SCHEDULES = {
    "cosine": {},
    "linear": {},
    "exponential": {},
    "constant": {"lr_final": 6e-4},
    "wsd": {"wsd_decay": "sqrt", "wsd_decay_fraction": 0.1},
}


def test_wsd_falls_in_a_line_over_the_last_fifth_unless_told_otherwise():
    optim = OptimConfig(schedule="wsd")
    assert (optim.wsd_decay_fraction, optim.wsd_decay) == (0.2, "linear")
    assert OptimConfig(schedule="wsd", wsd_decay=None).wsd_decay == "linear"
    assert OptimConfig(schedule="wsd", wsd_decay="sqrt").wsd_decay_fraction == 0.2


@pytest.mark.parametrize("name", ["wsd_decay", "wsd_decay_fraction"])
@pytest.mark.parametrize("schedule", sorted(set(SCHEDULES) - {"wsd"}))
def test_a_setting_of_wsd_is_refused_where_it_does_nothing(schedule, name):
    value = {"wsd_decay": "linear", "wsd_decay_fraction": 0.2}[name]  # even the default, since it was given
    with pytest.raises(
        ValidationError, match=rf"{name} \({value}\) does nothing under schedule '{schedule}'"
    ):
        OptimConfig(schedule=schedule, **SCHEDULES[schedule], **{name: value})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_settings_of_every_schedule_survive_being_written_and_read(schedule):
    optim = OptimConfig(schedule=schedule, **SCHEDULES[schedule])
    assert OptimConfig.model_validate(to_tree(optim)) == optim


def test_another_schedule_on_the_command_line_names_what_must_go_with_it():
    with pytest.raises(
        ConfigError, match=r"optim: wsd_decay_fraction .* does nothing under schedule 'cosine'"
    ):
        load_train_config("rwkv4-169m", ["optim.schedule=cosine"])
    removed = ["optim.wsd_decay=null", "optim.wsd_decay_fraction=null"]
    assert load_train_config("rwkv4-169m", ["optim.schedule=cosine", *removed]).optim.wsd_decay is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"schedule": "constant"}, "schedule 'constant' needs lr_final"),
        ({"lr_final": 1e-3}, "lr_final .* must not be above lr"),
        ({"schedule": "exponential", "lr_final": 0.0}, "lr_final\n.* greater than 0"),
        ({"schedule": "wsd", "wsd_decay_fraction": 0.0}, "wsd_decay_fraction\n.* greater than 0"),
        ({"schedule": "wsd", "wsd_decay_fraction": 1.5}, "wsd_decay_fraction\n.* less than or equal to 1"),
        ({"warmup_start": 0.0}, "warmup_start\n.* greater than 0"),
        ({"weight_decay": 0.0, "weight_decay_final": 0.1}, "weight_decay_final .* cannot be reached"),
        ({"weight_decay_final": 0.0}, "weight_decay_final\n.* greater than 0"),
        ({"l2wrap": -1e-4}, "l2wrap\n.* greater than or equal to 0"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, sentence):
    with pytest.raises(ValidationError, match=sentence):
        OptimConfig(**settings)


def test_the_published_penalty_is_the_default():
    assert OptimConfig().l2wrap == 1e-4
