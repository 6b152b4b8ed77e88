"""Whole runs: what they write, how they go on, what they refuse."""

import csv
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from rwkv_train.checkpoints import (
    list_training_checkpoints,
    load_training_checkpoint,
    read_weights,
    write_weights,
)
from rwkv_train.errors import CheckpointError, ConfigError, DataError, TrainingError
from rwkv_train.training.callbacks import RunCallback
from rwkv_train.training.run import run_pretraining

RWKV4 = {"arch": "rwkv4", "n_layer": 2, "n_embd": 32, "vocab_size": 257, "ctx_len": 16}


def final_state(summary):
    return load_training_checkpoint(list_training_checkpoints(summary.out_dir)[-1])


def assert_same_state(one, other):
    """Weights and both moments are equal, bit for bit."""
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        left, right = getattr(one, kind), getattr(other, kind)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left), kind


def metrics(summary):
    with (summary.out_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def stop_after(monkeypatch, step):
    """Send this process the signal of Ctrl-C when a step ends."""
    original = RunCallback._after_step

    def after_step(self, trainer, module):
        if module.completed_steps == step:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, trainer, module)

    monkeypatch.setattr(RunCallback, "_after_step", after_step)


@pytest.mark.parametrize("arch", ["rwkv7", "rwkv6", "rwkv5", "rwkv4"])
def test_a_run_learns_and_leaves_its_files(settings, tree, arch):
    if arch != "rwkv7":
        tree["model"] = {**RWKV4, "arch": arch}
    if arch in {"rwkv5", "rwkv6"}:
        tree["model"]["head_size"] = 16
    summary = run_pretraining(settings({"trainer.max_steps": 30}))

    assert summary.completed_steps == 30
    assert summary.tokens == 30 * 8 * 16
    # The validation text has 19 letters; a model that learnt nothing would need log2(257) = 8 bits.
    assert summary.validation.pooled.bits_per_byte < 5
    assert set(summary.validation.domains) == {"code", "prose"}
    assert [path.name for path in list_training_checkpoints(summary.out_dir)] == [
        "step-00000028",
        "step-00000030",
    ]
    for name in ("metrics.csv", "train.log", "samples.txt", "loss.png"):
        assert (summary.out_dir / name).stat().st_size > 0


def test_metrics_have_the_units_they_say(settings):
    summary = run_pretraining(settings())
    rows = metrics(summary)

    assert [int(row["step"]) for row in rows] == [0, 2, 4, 6, 8, 10, 12]
    assert float(rows[-1]["tokens"]) == 12 * 8 * 16
    # Random initial weights predict about as well as guessing among 257 tokens.
    assert float(rows[0]["val_loss"]) == pytest.approx(math.log(257), rel=0.05)
    assert float(rows[0]["val_bits_per_byte"]) == pytest.approx(math.log2(257), rel=0.05)
    assert float(rows[1]["loss"]) == pytest.approx(math.log(257), rel=0.1)
    last = rows[-1]
    assert float(last["val_bits_per_byte"]) == pytest.approx(float(last["val_loss"]) / math.log(2))  # bytes
    assert rows[0]["loss"] == ""
    assert rows[1]["val_loss"] == ""


@pytest.mark.parametrize(
    ("model", "trainer"),
    [
        ({}, {}),
        (RWKV4 | {"dropout": 0.2}, {}),
        ({}, {"precision": "bf16-autocast"}),
        ({}, {"precision": "bf16-params", "grad_checkpointing": True}),
        ({}, {"strategy": "fsdp2", "precision": "bf16-params"}),
        ({}, {"strategy": "deepspeed_2", "precision": "bf16-params"}),
        ({}, {"strategy": "deepspeed_3"}),
    ],
    ids=["plain", "dropout", "autocast", "bf16", "fsdp2 bf16", "zero 2 bf16", "zero 3"],
)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(
    settings, tree, tmp_path, monkeypatch, model, trainer
):
    tree["model"] = model or tree["model"]
    tree["trainer"] |= trainer
    undisturbed = run_pretraining(settings({"trainer.out_dir": str(tmp_path / "undisturbed")}))

    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        stopped = run_pretraining(settings({"trainer.out_dir": str(tmp_path / "stopped")}))
    assert (stopped.completed_steps, stopped.signal) == (5, signal.SIGINT)
    resumed = run_pretraining(settings())

    assert_same_state(final_state(resumed), final_state(undisturbed))
    assert final_state(resumed).manifest["tokens"] == 12 * 8 * 16
    assert [row["step"] for row in metrics(resumed)] == [row["step"] for row in metrics(undisturbed)]


def test_a_finished_run_is_left_as_it_is(settings):
    first = run_pretraining(settings())
    before = (first.checkpoint / "manifest.json").read_bytes()

    again = run_pretraining(settings())

    assert again.completed_steps == 12
    assert (first.checkpoint / "manifest.json").read_bytes() == before


def test_a_finished_run_can_be_made_longer(settings):
    run_pretraining(settings())
    assert run_pretraining(settings({"trainer.max_steps": 14})).completed_steps == 14


def test_accumulation_gives_the_weights_of_one_large_batch(settings, tmp_path):
    accumulated = run_pretraining(
        settings({"trainer.out_dir": str(tmp_path / "a"), "trainer.micro_batch_size": 2})
    )
    at_once = run_pretraining(
        settings({"trainer.out_dir": str(tmp_path / "b"), "trainer.micro_batch_size": 8})
    )

    left, right = final_state(accumulated).weights, final_state(at_once).weights
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=2e-5)


def test_the_best_and_the_newest_checkpoints_stay(settings):
    summary = run_pretraining(settings({"trainer.val_every_n_steps": 3, "checkpoint.every_n_steps": 3}))
    rows = [row for row in metrics(summary) if row["val_loss"]]
    best = min(rows, key=lambda row: float(row["val_loss"]))

    kept = {path.name for path in list_training_checkpoints(summary.out_dir)}

    assert kept == {"step-00000009", "step-00000012", f"step-{int(best['step']):08d}"}


def test_a_run_starts_from_published_weights(settings, tmp_path):
    source = run_pretraining(settings({"trainer.out_dir": str(tmp_path / "source")}))
    path = write_weights(tmp_path / "published.pth", read_weights(source.out_dir), "pth")

    changes = {
        "model.init_from": str(path),
        "trainer.out_dir": str(tmp_path / "next"),
        "trainer.max_steps": 1,
    }
    changes |= {"optim.lr": 1e-12, "optim.lr_final": 1e-12}
    continued = run_pretraining(settings(changes))

    before, after = final_state(source).weights, final_state(continued).weights
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(settings, monkeypatch):
    original = RunCallback._after_step

    def poison(self, trainer, module):
        original(self, trainer, module)
        if module.completed_steps == 6:
            with torch.no_grad():
                module.model.blocks[1].ffn.key.weight[0, 0] = float("nan")

    monkeypatch.setattr(RunCallback, "_after_step", poison)
    config = settings()
    with pytest.raises(
        TrainingError, match=r"step 7: .*first bad tensor is the parameter blocks\.1\.ffn\.key\.weight"
    ):
        run_pretraining(config)

    newest = list_training_checkpoints(Path(config.trainer.out_dir))[-1]
    assert newest.name == "step-00000006"  # the best validation so far
    assert all(tensor.isfinite().all() for tensor in load_training_checkpoint(newest).weights.values())


def test_two_runs_in_one_folder_are_refused(settings):
    config = settings()
    Path(config.trainer.out_dir).mkdir()
    with (
        FileLock(Path(config.trainer.out_dir) / ".lock"),
        pytest.raises(ConfigError, match="in use by another run"),
    ):
        run_pretraining(config)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model.n_layer": 1}, r"model\.n_layer is 1 but 2 in"),
        ({"trainer.global_batch_size": 16}, r"trainer\.global_batch_size is 16 but 8 in"),
        ({"trainer.seed": 7}, r"trainer\.seed is 7 but 42 in"),
        ({"optim.lr": 1e-3}, r"optim\.lr is 0\.001 but 0\.003 in"),
        ({"trainer.max_steps": 3}, "the run is 3 steps long but 12 are done"),
    ],
    ids=["model", "batch", "seed", "lr", "length"],
)
def test_going_on_with_other_settings_is_refused(settings, changes, sentence):
    run_pretraining(settings())
    with pytest.raises(ConfigError, match=sentence):
        run_pretraining(settings(changes))


def test_going_on_with_another_corpus_is_refused(settings, corpus):
    run_pretraining(settings())
    with pytest.raises(ConfigError, match=r"data\.train .* is not what .* was trained on"):
        run_pretraining(settings({"data.train": str(corpus / "valid"), "trainer.max_steps": 13}))


def test_starting_anew_in_a_folder_with_a_run_is_refused(settings):
    run_pretraining(settings())
    with pytest.raises(CheckpointError, match="already holds a run"):
        run_pretraining(settings(), resume="none")


def test_going_on_from_a_path_goes_back_to_it(settings):
    summary = run_pretraining(settings())
    first = list_training_checkpoints(summary.out_dir)[0]

    again = run_pretraining(settings({"trainer.max_steps": 13}), resume=str(first))

    assert again.completed_steps == 13
    assert len(metrics(again)) == 8


@pytest.mark.parametrize("resume", ["nowhere", "."], ids=["missing", "no checkpoint"])
def test_going_on_from_no_checkpoint_is_refused(settings, resume):
    with pytest.raises(CheckpointError, match="no training checkpoint"):
        run_pretraining(settings(), resume=resume)


def test_a_damaged_checkpoint_is_passed_over(settings, caplog):
    summary = run_pretraining(settings())
    older, newest = list_training_checkpoints(summary.out_dir)[-2:]
    path = newest / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])

    resumed = run_pretraining(settings({"trainer.max_steps": 13}))

    assert resumed.completed_steps == 13
    assert str(path) in caplog.text
    assert f"going on from {older}" in caplog.text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data.train": "nowhere/corpus"}, "nowhere/corpus"),
        ({"model.ctx_len": 100_000}, r"one sample needs 100001"),
        ({"model.vocab_size": 100}, r"the model's ids are 0 to 99"),
        ({"data.tokenizer": "world"}, "was made with the tokenizer 'bytes'"),
    ],
    ids=["missing", "short", "vocabulary", "tokenizer"],
)
def test_a_corpus_that_does_not_fit_is_refused_before_training(settings, changes, sentence):
    with pytest.raises(DataError, match=sentence):
        run_pretraining(settings(changes))
