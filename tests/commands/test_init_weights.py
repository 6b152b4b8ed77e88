import pytest

from rwkv_train.checkpoints import read_weights
from rwkv_train.commands.init_weights import init_weights
from rwkv_train.errors import ConfigError
from rwkv_train.models.registry import build_model, initialize

SMALL = ["model.n_layer=1", "model.n_embd=64", "trainer.seed=3"]


def test_what_is_written_is_what_a_run_starts_from(tmp_path):
    init_weights("quickstart", tmp_path / "untrained", SMALL)
    weights = read_weights(tmp_path / "untrained")
    model = build_model(weights.config)
    initialize(model, seed=3)
    assert all(weights.tensors[name].equal(value) for name, value in model.state_dict().items())
    assert (weights.step, weights.tokenizer.name) == (0, "bytes")


def test_a_run_that_starts_from_other_weights_has_none_of_its_own(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.init_from \(some\.pth\) is what the run starts from"):
        init_weights("quickstart", tmp_path / "untrained", [*SMALL, "model.init_from=some.pth"])
    assert not (tmp_path / "untrained").exists()
