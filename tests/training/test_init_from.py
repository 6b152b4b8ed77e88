import pytest

from rwkv_train.checkpoints import read_weights, write_weights
from rwkv_train.errors import ConfigError
from rwkv_train.tokenizers import TokenizerIdentity
from rwkv_train.training.run import run_pretraining


def test_weights_of_another_tokenizer_are_refused(settings, tmp_path):
    source = run_pretraining(settings({"trainer.out_dir": str(tmp_path / "source"), "trainer.max_steps": 1}))
    weights = read_weights(source.out_dir)
    foreign = weights._replace(tokenizer=TokenizerIdentity("world", "0" * 64))
    path = write_weights(tmp_path / "foreign", foreign, "safetensors")

    changes = {"model.init_from": str(path), "trainer.out_dir": str(tmp_path / "next")}
    with pytest.raises(
        ConfigError, match=r"was trained with the tokenizer 'world', the corpus was made with 'bytes'"
    ):
        run_pretraining(settings(changes))
