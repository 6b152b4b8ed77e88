"""Where a run goes on from: the paths that a user may give."""

import pytest

from rwkv_train.checkpoints import list_training_checkpoints
from rwkv_train.errors import CheckpointError
from rwkv_train.training.run import run_pretraining


@pytest.fixture
def finished(settings):
    """The newest checkpoint of a run of 12 steps."""
    return list_training_checkpoints(run_pretraining(settings({"trainer.sample_tokens": 0})).out_dir)[-1]


def test_a_file_of_a_checkpoint_means_the_checkpoint(finished, settings, tmp_path, caplog):
    changes = {"trainer.out_dir": str(tmp_path / "next"), "trainer.max_steps": 13}
    run_pretraining(settings(changes), resume=str(finished / "model.safetensors"))
    assert f"going on from {finished}" in caplog.text


def test_weights_alone_are_not_enough_to_go_on(finished, settings, tmp_path):
    bare = tmp_path / "model.safetensors"
    bare.write_bytes((finished / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"there is no training checkpoint; .*out_dir"):
        run_pretraining(settings(), resume=str(bare))
