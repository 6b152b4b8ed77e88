"""Whole runs on several corpora and on a stream: what they log, how they go on, what they refuse."""

import json
import struct

import numpy as np
import pytest
import torch
from datasets import Dataset

from rwkv_train.checkpoints import list_training_checkpoints, load_training_checkpoint
from rwkv_train.data.binidx import TokenFileWriter
from rwkv_train.errors import CheckpointError, ConfigError, DataError
from rwkv_train.planning.plan import make_plan
from rwkv_train.training.callbacks import RunCallback
from rwkv_train.training.loggers import METRICS_FILE, read_metrics
from rwkv_train.training.run import run_pretraining

WORDS = ["state", "decay", "value", "key", "mixes", "reads", "writes", "every", "token", "head"]


class StoppedError(Exception):
    """Stands for a process that is killed."""


@pytest.fixture
def small(tree):
    """Settings of a run of a second, without validation."""
    tree["model"] = {"arch": "rwkv4", "n_layer": 1, "n_embd": 16, "vocab_size": 257, "ctx_len": 16}
    tree["data"]["valid"] = None
    return tree


@pytest.fixture
def mixed(small, corpus):
    small["data"]["train"] = [
        {"path": str(corpus / "train"), "weight": 3},
        {"path": str(corpus / "valid"), "weight": 1},
    ]
    return small


@pytest.fixture
def streamed(small, tmp_path):
    """Texts of which a run of 12 steps reads about two thirds, 8 samples of 16 tokens a step, and a buffer of 5."""
    texts = [" ".join(WORDS[: number % 10]) for number in range(80)]
    Dataset.from_dict({"text": texts}).to_json(tmp_path / "texts.jsonl")
    small["data"].pop("train")
    small["data"]["streaming"] = {
        "path": "json",
        "data_files": [str(tmp_path / "texts.jsonl")],
        "shuffle_buffer": 5,
    }
    return small


def final_state(summary):
    return load_training_checkpoint(list_training_checkpoints(summary.out_dir)[-1])


def assert_same_weights(one, other):
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert all(torch.equal(one.exp_avg[name], other.exp_avg[name]) for name in one.exp_avg)


def kill_after(monkeypatch, step):
    original = RunCallback._after_step

    def after_step(self, trainer, module):
        original(self, trainer, module)
        if module.completed_steps == step:
            raise StoppedError

    monkeypatch.setattr(RunCallback, "_after_step", after_step)


def test_what_was_drawn_from_each_corpus_is_logged_saved_and_summed_up(mixed, settings):
    summary = run_pretraining(settings())
    last = read_metrics(summary.out_dir / METRICS_FILE)[-1]
    drawn = final_state(summary).manifest["data"]["drawn"]

    # 12 steps of 8 samples of 16 tokens, three quarters from one.
    assert (int(last["tokens/train"]), int(last["tokens/valid"])) == (72 * 16, 24 * 16)
    assert [(part["name"], part["tokens"]) for part in drawn] == [("train", 72 * 16), ("valid", 24 * 16)]
    assert float(last["epochs/valid"]) == pytest.approx(24 / (2404 // 16), rel=0.02)
    assert dict(summary.rows())["from train"].startswith("1,152 tokens, ")


def test_a_plan_says_what_is_drawn_from_each_corpus(mixed, settings):
    rows = dict(make_plan(settings()).rows())
    assert rows["from valid"].startswith("384 tokens, ")
    assert "training corpus" not in rows


def test_going_on_with_other_weights_or_corpora_is_refused(mixed, settings):
    run_pretraining(settings())
    mixed["trainer"]["max_steps"] = 13
    first, second = mixed["data"]["train"]
    for other in ([first, {**second, "weight": 2}], [second, first], first["path"]):
        with pytest.raises(ConfigError, match=r"data\.train .* is not what .*weight 3: .*; weight 1: "):
            run_pretraining(settings({"data.train": other}))
    assert run_pretraining(settings({"data.train": [first, second]})).completed_steps == 13


@pytest.mark.parametrize("killed_after", [6, 8])  # two steps after a save, and right after one
def test_a_streaming_run_that_was_killed_ends_like_one_that_was_not(
    streamed, settings, tmp_path, monkeypatch, killed_after
):
    undisturbed = run_pretraining(settings({"trainer.out_dir": str(tmp_path / "undisturbed")}))
    config = settings({"trainer.out_dir": str(tmp_path / "killed")})
    with monkeypatch.context() as patch:
        kill_after(patch, killed_after)
        with pytest.raises(StoppedError):
            run_pretraining(config)
    resumed = run_pretraining(settings())

    assert_same_weights(final_state(resumed), final_state(undisturbed))
    losses = [
        [row["loss"] for row in read_metrics(run.out_dir / METRICS_FILE)] for run in (resumed, undisturbed)
    ]
    assert losses[0] == losses[1]


def test_a_stream_without_its_place_is_not_gone_on_with(streamed, settings):
    summary = run_pretraining(settings())
    damaged = summary.checkpoint / "stream.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for other in list_training_checkpoints(summary.out_dir)[:-1]:
        (other / "stream.safetensors").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint in it is damaged"):
        run_pretraining(settings({"trainer.max_steps": 13}))


def test_a_run_without_a_better_validation_ends_early_and_stays_so(tree, settings, corpus, caplog):
    tree["trainer"] |= {"val_every_n_steps": 2, "early_stopping_patience": 3, "sample_tokens": 0}
    # A rate at which float32 weights do not change: each validation finds the very loss of the first.
    tree["optim"] |= {"lr": 1e-30, "lr_final": 1e-30}
    summary = run_pretraining(settings())
    again = run_pretraining(settings())

    assert (summary.completed_steps, again.completed_steps) == (6, 6)
    assert "3 validations in a row were not below the loss of" in summary.ended_early
    assert dict(summary.rows())["ended early"] == again.ended_early
    assert summary.checkpoint.name == "step-00000006"
    assert "nothing to do: the run ended with step 6" in caplog.text
    assert run_pretraining(settings({"trainer.early_stopping_patience": 5})).completed_steps == 10
    # Of other text the first loss, at step 12, is the best one.
    assert run_pretraining(settings({"data.valid": str(corpus / "train")})).completed_steps == 12


def write_pair(prefix, tokens, dtype=np.uint16):
    with TokenFileWriter(prefix, dtype) as writer:
        writer.add_document(np.array(tokens, dtype))


def damage(prefix, kind):
    index = prefix.with_suffix(".idx")
    content = bytearray(index.read_bytes())
    if kind == "code":
        content[17] = 7
    else:
        struct.pack_into("<i", content, 34, 5)
    index.write_bytes(content)


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda prefix: write_pair(prefix, [1, 2, 3]), "has 3 tokens, one sample needs 17"),
        (lambda prefix: write_pair(prefix, [300] * 40, np.int32), "holds the token id 300, but"),
        (lambda prefix: (write_pair(prefix, [1] * 40), damage(prefix, "code")), "has tokens of type code 7"),
        (
            lambda prefix: (write_pair(prefix, [1] * 40), damage(prefix, "size")),
            "has 80 bytes, but its index",
        ),
    ],
    ids=["too short", "vocabulary", "floating point", "disagreement"],
)
def test_a_corpus_that_cannot_be_used_is_refused_before_any_step(
    small, settings, tmp_path, prepare, sentence
):
    prepare(tmp_path / "pair")
    with pytest.raises(DataError, match=sentence) as refused:
        run_pretraining(settings({"data.train": str(tmp_path / "pair")}))
    assert refused.value.exit_code == 2
    assert not (tmp_path / "run" / METRICS_FILE).exists()


def test_a_manifest_of_a_stream_names_its_place(streamed, settings):
    manifest = json.loads((run_pretraining(settings()).checkpoint / "manifest.json").read_text())
    assert manifest["data"]["stream"]["sample"] == manifest["data"]["samples"] == 96
    assert manifest["files"].keys() == {"model.safetensors", "optimizer.safetensors", "stream.safetensors"}
