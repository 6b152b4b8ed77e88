"""Where a run goes on from: the paths that a user may give."""

import pytest

from rwkv_train.checkpoints import list_training_checkpoints
from rwkv_train.checkpoints.manifest import read_manifest, write_manifest
from rwkv_train.errors import CheckpointError, ConfigError
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


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_seconds": None}, "'train_seconds' is null, not of type int or float"),
        ({"random": {}}, r"it has no 'cpu'"),
        ({"random": {"cpu": "AAAA"}}, "random state of a manifest.json is not PyTorch's"),
        ({"data": {}}, "it has no 'train'"),
        ({"config": {"model": []}}, r"'model' is \[\], not of type dict"),
    ],
    ids=["seconds", "random", "random state", "data", "config"],
)
def test_a_manifest_that_lacks_what_the_next_step_needs_is_refused(finished, settings, changes, sentence):
    write_manifest(finished, read_manifest(finished) | changes)
    with pytest.raises(CheckpointError, match=sentence):
        run_pretraining(settings({"trainer.max_steps": 13}))


def test_metrics_and_notes_that_a_power_cut_spoilt_do_not_stop_a_run(finished, settings):
    out_dir = finished.parents[1]
    with (out_dir / "metrics.csv").open("ab") as file:
        file.write(b"13,\xff\x00\x00")
    assert run_pretraining(settings({"trainer.max_steps": 13})).completed_steps == 13

    (finished.parent / "best.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"best\.json does not name .* remove it"):
        run_pretraining(settings({"trainer.max_steps": 14}))


def test_the_learning_rate_changes_only_where_that_is_asked_for(finished, settings, caplog):
    changes = {"trainer.max_steps": 13, "optim.lr": 1e-3}
    with pytest.raises(ConfigError, match=r"optim\.lr is 0\.001 but 0\.003 .* --allow-change optim\.lr"):
        run_pretraining(settings(changes))
    assert run_pretraining(settings(changes), allow_change=["optim.lr"]).completed_steps == 13
    assert "optim.lr changes from 0.003 to 0.001" in caplog.text


@pytest.mark.parametrize("name", ["optim.lrr", "trainer.seed", "model.n_layer", "lr"])
def test_what_never_may_change_cannot_be_asked_for(finished, settings, name):
    with pytest.raises(
        ConfigError, match=rf"--allow-change {name}: it is none of model\.dropout, .*optim\.lr,"
    ):
        run_pretraining(settings(), allow_change=[name])
