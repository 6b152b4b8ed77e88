"""Bad steps: what counts as one, and what a run does about it."""

import math
import weakref

import pytest
import torch

from rwkv_train.checkpoints import list_training_checkpoints, load_training_checkpoint
from rwkv_train.config.guard import GuardConfig
from rwkv_train.data.module import CorpusSamples
from rwkv_train.errors import CheckpointError, TrainingError
from rwkv_train.training import pretraining
from rwkv_train.training.guard import Guard
from rwkv_train.training.loggers import METRICS_FILE, read_metrics
from rwkv_train.training.module import TrainingModule
from rwkv_train.training.run import run_pretraining


def guard_after(losses, **settings):
    guard = Guard(GuardConfig(**settings))
    for loss in losses:
        assert guard.judge(1.0, loss) is None
        guard.note_good(loss)
    return guard


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_bad(norm):
    assert "gradient is not finite" in Guard(GuardConfig()).judge(norm, None)


def test_a_loss_above_the_factor_times_the_median_is_a_spike():
    guard = guard_after([2.0] * 9 + [1.0] * 2, loss_spike=1.5)  # median 2.0
    assert guard.judge(1.0, 2.999) is None
    assert "more than 1.5 times the median" in guard.judge(1.0, 3.001)


def test_a_spike_does_not_raise_the_median():
    guard = guard_after([2.0] * 10, loss_spike=1.5)
    assert all(guard.judge(1.0, 100.0) for _ in range(20))


def test_before_there_are_ten_losses_none_is_a_spike():
    assert guard_after([1.0] * 9, loss_spike=1.1).judge(1.0, 50.0) is None


def test_without_a_factor_no_finite_loss_is_bad():
    assert guard_after([1.0] * 20).judge(1.0, 1e6) is None


def test_one_bad_step_more_than_allowed_within_the_window_is_too_many():
    guard = Guard(GuardConfig(action="skip", max_bad_steps=2, window=10))
    assert [guard.note_bad(step) for step in (1, 5, 10)] == [True, True, False]
    assert guard.note_bad(30)  # the others have left the window


def test_a_loss_that_was_judged_and_not_noted_leaves_the_median_as_it_was():
    guard = guard_after([2.0] * 10, loss_spike=1.5)
    assert all(guard.judge(1.0, 2.9) is None for _ in range(20))
    assert guard.judge(1.0, 3.001) is not None


@pytest.mark.parametrize(("action", "may_go_on"), [("rollback", False), ("skip", True)])
def test_under_rollback_every_bad_step_since_the_checkpoint_counts(action, may_go_on):
    guard = Guard(GuardConfig(action=action, max_bad_steps=2, window=10))
    assert guard.note_bad(120, 100)
    assert guard.note_bad(140, 100)
    assert guard.note_bad(160, 100) is may_go_on


def test_what_a_guard_remembers_survives_a_checkpoint():
    guard = guard_after([2.0] * 10, loss_spike=1.5, action="skip")
    guard.note_bad(11)
    again = Guard(GuardConfig(loss_spike=1.5, action="skip"), guard.to_json())
    assert again.bad_steps == [11]
    assert again.judge(1.0, 4.0) is not None


def test_a_damaged_memory_is_refused():
    with pytest.raises(CheckpointError, match="guard"):
        Guard(GuardConfig(), {"losses": ["2"], "bad_steps": []})


@pytest.fixture
def poisoned_samples(monkeypatch):
    """Make the loss of some samples not a number, wherever they are read: ``poisoned_samples(range(40, 48))``."""
    poisoned = set()
    original = TrainingModule.training_step

    def training_step(self, batch, batch_index):
        lanes = range(batch.first_sample, batch.first_sample + len(batch.tokens))
        loss = original(self, batch, batch_index)
        return loss * math.nan if poisoned & set(lanes) else loss

    monkeypatch.setattr(TrainingModule, "training_step", training_step)
    return poisoned.update


@pytest.fixture
def read_samples(monkeypatch):
    """Numbers of the samples that were read, in order."""
    numbers = []
    original = CorpusSamples.read
    monkeypatch.setattr(
        CorpusSamples, "read", lambda self, sample: (numbers.append(sample), original(self, sample))[1]
    )
    return numbers


QUIET = {"trainer.sample_tokens": 0, "trainer.log_every_n_steps": 1, "checkpoint.keep_last": 9}
STRATEGIES = ["auto", "fsdp2", "deepspeed_1", "deepspeed_3"]


def weights_after(summary, step):
    return load_training_checkpoint(summary.out_dir / "checkpoints" / f"step-{step:08d}").weights


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_skipping_leaves_weights_and_moments_as_they_were(settings, tmp_path, poisoned_samples, strategy):
    poisoned_samples(range(5 * 8, 6 * 8))  # step 6 of 8 samples each
    changes = {"guard.action": "skip", "trainer.strategy": strategy, "checkpoint.every_n_steps": 1}
    summary = run_pretraining(settings(QUIET | changes))

    before, after = (
        load_training_checkpoint(summary.out_dir / "checkpoints" / f"step-{step:08d}") for step in (5, 6)
    )
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        left, right = getattr(before, kind), getattr(after, kind)
        assert all(torch.equal(left[name], right[name]) for name in left), kind
    assert summary.completed_steps == 12
    assert all(weight.isfinite().all() for weight in weights_after(summary, 12).values())
    steps = [row["step"] for row in read_metrics(summary.out_dir / METRICS_FILE) if row["loss"]]
    assert steps == [str(step) for step in range(1, 13) if step != 6]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_resumed_after_a_skipped_step_ends_bit_for_bit_like_an_undisturbed_one(
    settings, tmp_path, poisoned_samples, strategy
):
    poisoned_samples(range(8, 16))
    ends = []
    for name, stops in (("undisturbed", [12]), ("resumed", [5, 12])):
        changes = {"guard.action": "skip", "trainer.strategy": strategy, "optim.schedule": "constant"}
        changes |= {"optim.lr_final": 3e-3, "trainer.out_dir": str(tmp_path / name)}
        for n_steps in stops:
            summary = run_pretraining(settings(QUIET | changes | {"trainer.max_steps": n_steps}))
        ends.append(weights_after(summary, 12))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rolling_back_goes_on_from_the_last_checkpoint_with_the_data_after_the_bad_step(
    settings, poisoned_samples, read_samples, strategy
):
    poisoned_samples(range(5 * 8, 6 * 8))
    summary = run_pretraining(settings(QUIET | {"guard.action": "rollback", "trainer.strategy": strategy}))

    # Steps 1 to 6 read samples 0 to 47; back to step 4, steps 5 to 12 read from 48 on.
    assert read_samples == list(range(48)) + list(range(48, 48 + 8 * 8))
    assert summary.completed_steps == 12
    manifest = load_training_checkpoint(list_training_checkpoints(summary.out_dir)[-1]).manifest
    assert manifest["data"]["skipped"] == 2 * 8
    assert manifest["data"]["samples"] == 48 + 8 * 8


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2", "deepspeed_1"])
def test_rolling_back_keeps_one_model_in_memory(settings, monkeypatch, poisoned_samples, strategy):
    made = []
    alive = []
    original = pretraining.build_model

    def build(*args, **kwargs):
        alive.append([model() is not None for model in made])
        model = original(*args, **kwargs)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(pretraining, "build_model", build)
    poisoned_samples(range(5 * 8, 6 * 8))
    run_pretraining(settings(QUIET | {"guard.action": "rollback", "trainer.strategy": strategy}))
    assert alive == [[], [False]]


def test_a_run_that_was_rolled_back_resumes_with_the_data_that_is_next(
    settings, poisoned_samples, read_samples
):
    poisoned_samples(range(5 * 8, 6 * 8))
    run_pretraining(settings(QUIET | {"guard.action": "rollback"}))
    read_samples.clear()
    run_pretraining(settings({"trainer.max_steps": 13}))
    assert read_samples == list(range(112, 120))


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_too_many_bad_steps_stop_the_run_and_leave_its_checkpoint(
    settings, tmp_path, poisoned_samples, action
):
    poisoned_samples(range(5 * 8, 1000))
    config = settings(
        QUIET | {"guard.action": action, "guard.max_bad_steps": 2, "trainer.val_every_n_steps": 100}
    )
    with pytest.raises(TrainingError, match=r"bad step 3 from step \d on, guard\.max_bad_steps is 2"):
        run_pretraining(config)
    newest = list_training_checkpoints(config.trainer.run_folder)[-1]
    assert newest.name == "step-00000004"
    assert all(weight.isfinite().all() for weight in load_training_checkpoint(newest).weights.values())


def test_before_the_first_checkpoint_rolling_back_is_skipping(settings, poisoned_samples, caplog):
    poisoned_samples(range(8, 16))
    summary = run_pretraining(settings(QUIET | {"guard.action": "rollback"}))
    assert summary.completed_steps == 12
    assert "step 2: the gradient is not finite" in caplog.text
    assert "skipped, as there is no checkpoint yet" in caplog.text


def test_a_loss_that_leaps_is_skipped(settings, monkeypatch):
    original = CorpusSamples.read

    def read(self, sample):
        tokens, targets = original(self, sample)
        # Bytes that the corpus does not have: a model that has learnt something does not expect them.
        return (tokens, torch.full_like(targets, 200)) if sample // 8 == 29 else (tokens, targets)

    monkeypatch.setattr(CorpusSamples, "read", read)
    changes = {"guard.action": "skip", "guard.loss_spike": 1.5, "trainer.max_steps": 32}
    summary = run_pretraining(settings(QUIET | changes))
    steps = [int(row["step"]) for row in read_metrics(summary.out_dir / METRICS_FILE) if row["loss"]]
    assert steps == [step for step in range(1, 33) if step != 30]
