"""Where metrics go."""

import pytest
import wandb

from rwkv_train.errors import ConfigError
from rwkv_train.training.run import run_pretraining


def test_weights_and_biases_out_of_reach_is_refused_before_training(settings, monkeypatch):
    def refuse(**settings):
        raise wandb.errors.CommError("no such host")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        ConfigError, match=r"trainer\.wandb_project is 'mine' .*no such host.*WANDB_MODE=offline"
    ):
        run_pretraining(settings({"trainer.wandb_project": "mine"}))
