"""A disk without room for a checkpoint, noticed before anything is trained."""

import shutil
from types import SimpleNamespace

import pytest

from rwkv_train.checkpoints import list_training_checkpoints
from rwkv_train.errors import CheckpointError
from rwkv_train.training.run import run_pretraining


def test_a_run_without_room_for_a_checkpoint_is_refused_at_its_start_and_runs_once_there_is(
    settings, tmp_path, monkeypatch
):
    config = settings({"trainer.max_steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
        with pytest.raises(CheckpointError, match="free some space"):
            run_pretraining(config)
    assert list_training_checkpoints(tmp_path / "run") == []
    assert not (tmp_path / "run" / "metrics.csv").exists()

    assert run_pretraining(config).completed_steps == 2
