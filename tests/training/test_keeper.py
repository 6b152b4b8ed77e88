"""Which checkpoints a run writes and keeps."""

import pytest

from rwkv_train.checkpoints import list_training_checkpoints
from rwkv_train.checkpoints import training_state as checkpoint_files
from rwkv_train.checkpoints.retention import read_best, write_best
from rwkv_train.errors import CheckpointError, ConfigError
from rwkv_train.training import keeper
from rwkv_train.training.run import run_pretraining

QUIET = {"trainer.val_every_n_steps": 100, "trainer.sample_tokens": 0}


@pytest.fixture
def steps_kept(settings, tree):
    """Run with some settings changed; return the steps of the checkpoints that are there in the end."""

    def run(**changes):
        tree["data"]["valid"] = None
        tree["checkpoint"] |= changes
        summary = run_pretraining(settings({"trainer.sample_tokens": 0}))
        return [
            int(folder.name.removeprefix("step-")) for folder in list_training_checkpoints(summary.out_dir)
        ]

    return run


def test_by_steps_the_newest_few_are_kept(steps_kept):
    assert steps_kept(every_n_steps=4, keep_last=2) == [8, 12]


def test_milestones_are_written_and_kept(steps_kept):
    assert steps_kept(every_n_steps=100, keep_last=1, keep_every_n_steps=5) == [5, 10, 12]


def test_a_checkpoint_follows_when_its_minutes_have_passed(steps_kept, monkeypatch):
    clock = iter(range(0, 100_000, 25))  # seconds; asked for twice a step, and twice more by a save
    monkeypatch.setattr(keeper.time, "monotonic", lambda: next(clock))
    kept = steps_kept(every_n_steps=100, every_n_minutes=2.0, keep_last=99)
    assert 12 in kept
    assert 1 not in kept
    assert 2 < len(kept) < 12


def test_files_are_split_at_the_size_that_is_set(settings, steps_kept):
    steps_kept(max_file_gb=1e-4)  # 100 kB; the weights have 186 kB
    newest = list_training_checkpoints(settings().trainer.run_folder)[-1]
    assert (newest / "model-00001-of-00002.safetensors").is_file()
    assert run_pretraining(settings({"trainer.max_steps": 13})).completed_steps == 13


def test_a_disk_without_room_for_one_checkpoint_is_refused_before_the_first_step(settings, monkeypatch):
    monkeypatch.setattr("rwkv_train.training.run.checkpoint_bytes", lambda config, own: 1 << 60)
    with pytest.raises((CheckpointError, ConfigError), match=r"free"):
        run_pretraining(settings(QUIET))


def test_a_disk_that_fills_up_stops_the_run_and_leaves_the_last_checkpoint(settings, monkeypatch):
    original = checkpoint_files.checkpoint_bytes
    sizes = iter([original(settings().model), 1 << 60])
    monkeypatch.setattr(checkpoint_files, "checkpoint_bytes", lambda config, own: next(sizes))
    with pytest.raises(CheckpointError, match=r"step-00000008 cannot be written: .* free"):
        run_pretraining(settings(QUIET))
    assert [f.name for f in list_training_checkpoints(settings().trainer.run_folder)] == ["step-00000004"]


@pytest.mark.parametrize(("val_tokens", "is_best_of_the_first_run"), [(256, True), (128, False)])
def test_the_best_checkpoint_is_the_best_on_the_same_text(settings, val_tokens, is_best_of_the_first_run):
    changes = {"trainer.sample_tokens": 0, "trainer.val_every_n_steps": 4, "trainer.val_tokens": 256}
    out_dir = run_pretraining(settings(changes | {"trainer.max_steps": 4})).out_dir
    best = read_best(out_dir)
    write_best(out_dir, best._replace(loss=1e-3))  # nothing that follows is as low

    run_pretraining(settings(changes | {"trainer.max_steps": 8, "trainer.val_tokens": val_tokens}))
    assert (read_best(out_dir).step == best.step) == is_best_of_the_first_run
