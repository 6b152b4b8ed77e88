import pytest
from pydantic import ValidationError

from rwkv_train.config.preference import PreferenceConfig


@pytest.mark.parametrize(
    ("loss", "own"),
    [
        ("dpo", {"label_smoothing": 0.0, "chosen_weight": 0.0, "gamma": None}),
        ("orpo", {"label_smoothing": None, "chosen_weight": None, "gamma": None}),
        ("simpo", {"label_smoothing": None, "chosen_weight": None, "gamma": 0.5}),
    ],
)
def test_a_loss_has_its_own_settings_and_no_others(loss, own):
    config = PreferenceConfig(loss=loss)
    assert {name: getattr(config, name) for name in own} == own
    assert PreferenceConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "orpo", "gamma": 0.5}, r"gamma \(0\.5\) does nothing with the loss 'orpo'.* to 'simpo'"),
        ({"loss": "simpo", "label_smoothing": 0.1}, r"label_smoothing \(0\.1\) does nothing"),
        ({"loss": "simpo", "chosen_weight": 0.0}, r"chosen_weight \(0\) does nothing"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"beta": 0}, "greater than 0"),
        ({"loss": "ipo"}, "'dpo', 'orpo' or 'simpo'"),
    ],
)
def test_settings_of_another_loss_or_out_of_range_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        PreferenceConfig.model_validate(settings)
