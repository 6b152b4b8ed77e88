"""``rwkv-train pretrain``: which settings a command line comes to."""

import shutil

import pytest
import yaml

from rwkv_train.checkpoints import write_weights
from rwkv_train.checkpoints.infer import make_explicit
from rwkv_train.checkpoints.training_state import ParameterState, save_training_checkpoint
from rwkv_train.config.save import to_tree
from rwkv_train.errors import CheckpointError, ConfigError
from rwkv_train.training.settings import load_settings


@pytest.fixture
def started(weights, tmp_path):
    """Settings of a run that starts from published weights, and the path of the weights."""
    path = write_weights(tmp_path / "published.pth", weights, "pth")
    settings = {
        "model": {"init_from": str(path), "ctx_len": 16},
        "trainer": {"out_dir": str(tmp_path / "run"), "max_steps": 3},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file, path


def test_the_sizes_come_from_the_weights(started, weights):
    model = load_settings(str(started[0]), []).model
    assert (model.n_layer, model.n_embd, model.head_size) == (1, 32, 16)
    assert model.ranks == weights.config.ranks


def test_a_size_that_differs_from_the_weights_is_refused(started):
    with pytest.raises(ConfigError, match=r"model\.n_layer is 5 but 1 in the weights"):
        load_settings(str(started[0]), ["model.n_layer=5"])


def test_a_run_goes_on_without_the_weights_that_it_started_from(started, weights, tmp_path):
    file, path = started
    settings = load_settings(str(file), [])
    manifest = {
        "step": 1,
        "tokens": 16,
        "config": to_tree(settings),
        "arch_config": to_tree(make_explicit(settings.model)),  # as a run writes it, without init_from
        "tokenizer": None,
        "random": {},
        "data": {},
    }
    parameters = [ParameterState(name, tensor, None, None) for name, tensor in weights.tensors.items()]
    save_training_checkpoint(tmp_path / "run", manifest, parameters)
    path.unlink()

    assert load_settings(str(file), []) == settings
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CheckpointError, match="there is no such file"):
        load_settings(str(file), [])
