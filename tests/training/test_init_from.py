import pytest

from rwkv_train.checkpoints import convert, read_weights, write_weights
from rwkv_train.errors import ConfigError
from rwkv_train.tokenizers import TokenizerIdentity
from rwkv_train.training.loggers import METRICS_FILE, read_metrics
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


@pytest.mark.parametrize("arch", ["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def test_a_converted_checkpoint_starts_with_the_same_loss(settings, tree, tmp_path, arch):
    sizes = {} if arch == "rwkv4" else {"head_size": 16}
    tree["model"] = {"arch": arch, "n_layer": 2, "n_embd": 32, "vocab_size": 257, "ctx_len": 16, **sizes}
    source = run_pretraining(settings({"trainer.out_dir": str(tmp_path / "source"), "trainer.max_steps": 3}))
    paths = [source.out_dir]
    for to, name in (("pth", "a.pth"), ("safetensors", "b"), ("hf", "c")):
        paths.append(convert(paths[-1], tmp_path / name, to).path)

    losses = []
    for number, path in enumerate(paths):
        changes = {"model.init_from": str(path), "trainer.out_dir": str(tmp_path / f"next-{number}")}
        summary = run_pretraining(
            settings({**changes, "trainer.max_steps": 1, "trainer.log_every_n_steps": 1})
        )
        losses.append(
            next(row["loss"] for row in read_metrics(summary.out_dir / METRICS_FILE) if row["loss"])
        )
    assert losses == [losses[0]] * 4
