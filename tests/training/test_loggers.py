"""Where metrics go."""

import pytest
import wandb

from rwkv_train.errors import ConfigError
from rwkv_train.training.loggers import read_metrics
from rwkv_train.training.run import run_pretraining


def test_weights_and_biases_out_of_reach_is_refused_before_training(settings, monkeypatch):
    def refuse(**settings):
        raise wandb.errors.CommError("no such host")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        ConfigError, match=r"trainer\.wandb_project is 'mine' .*no such host.*WANDB_MODE=offline"
    ):
        run_pretraining(settings({"trainer.wandb_project": "mine"}))


def test_a_row_that_a_kill_cut_off_is_not_read(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,lr\n10,3.5,0.1\n12")  # of "120,2.5,0.1"
    assert [row["step"] for row in read_metrics(path)] == ["10"]
