import pytest
from filelock import FileLock

from rwkv_train.checkpoints import (
    list_training_checkpoints,
    load_training_checkpoint,
    newest_valid_checkpoint,
    prune_training_checkpoints,
    save_training_checkpoint,
)
from rwkv_train.checkpoints.lock import hold_run_folder
from rwkv_train.checkpoints.retention import BestCheckpoint, prune_run, read_best, write_best
from rwkv_train.errors import CheckpointError, ConfigError


def save(out_dir, state):
    return save_training_checkpoint(out_dir, state.manifest, state.parameters())


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


def steps_in(run):
    return [int(folder.name.removeprefix("step-")) for folder in list_training_checkpoints(run)]


def test_pruning_keeps_the_last_ones_and_the_named_ones(run, training_state, tmp_path, monkeypatch):
    save(run, training_state(20))
    monkeypatch.chdir(run.parent)
    named = {(run / "checkpoints" / "step-00000005").relative_to(run.parent)}
    prune_training_checkpoints(run, keep_last=2, keep=named)
    assert names_in(run / "checkpoints") == ["step-00000005", "step-00000015", "step-00000020"]


def test_pruning_removes_nothing_else(run):
    (run / "checkpoints" / "notes.txt").touch()
    (run / "checkpoints" / "step-00000001").mkdir()
    prune_training_checkpoints(run, keep_last=1, keep=set())
    assert names_in(run / "checkpoints") == ["notes.txt", "step-00000001", "step-00000015"]


def test_an_incomplete_checkpoint_does_not_count_as_kept(run, folder):
    (folder / "optimizer.safetensors").unlink()
    prune_training_checkpoints(run, keep_last=1, keep=set())
    assert "step-00000010" in names_in(run / "checkpoints")


def test_pruning_killed_at_any_moment_leaves_what_it_keeps(run, training_state, die_after, killed):
    for n in range(20):
        for step in (5, 10, 15):
            save(run, training_state(step))
        try:
            with die_after(n):
                prune_training_checkpoints(run, keep_last=1, keep=set())
        except killed:
            assert newest_valid_checkpoint(run).name == "step-00000015"
            for folder in list_training_checkpoints(run):
                load_training_checkpoint(folder)
        else:
            break
    assert 2 < n < 19
    assert names_in(run / "checkpoints")[-1] == "step-00000015"


def test_after_going_back_the_new_branch_is_the_newest_one(run, folder, training_state):
    (folder / "model.safetensors").write_bytes(b"damaged")
    save(run, training_state(12))
    prune_training_checkpoints(run, keep_last=1, keep=set())
    assert names_in(run / "checkpoints") == ["step-00000012"]


def test_keeping_none_is_refused(run):
    with pytest.raises(ValueError, match=r"keep_last \(0\)"):
        prune_training_checkpoints(run, keep_last=0, keep=set())


def test_the_best_checkpoint_stays(run):
    assert read_best(run) is None
    write_best(run, BestCheckpoint("step-00000005", 5, 2.5))
    prune_training_checkpoints(run, keep_last=1)
    assert steps_in(run) == [5, 15]
    assert read_best(run) == ("step-00000005", 5, 2.5)


@pytest.mark.parametrize(
    "note",
    [
        "{}",
        "[]",
        '{"checkpoint": "step-00000005", "step": 5}',
        '{"checkpoint": 5, "step": 5, "loss": 2.5}',
        "{",
    ],
)
def test_a_damaged_note_of_the_best_one_stops_the_removal(run, note):
    (run / "checkpoints" / "best.json").write_text(note)
    with pytest.raises(CheckpointError, match=r"best\.json.*; remove it to go on without"):
        prune_training_checkpoints(run, keep_last=1)
    assert steps_in(run) == [5, 10, 15]


@pytest.mark.parametrize(("every", "left"), [(5, [5, 10, 15, 20]), (10, [10, 20]), (7, [20]), (None, [20])])
def test_milestones_stay(run, training_state, every, left):
    save(run, training_state(20))
    prune_training_checkpoints(run, keep_last=1, keep_every_n_steps=every)
    assert steps_in(run) == left


def test_a_dry_run_removes_nothing_and_says_what_would_be(run):
    expected = [run / "checkpoints" / name for name in ("step-00000005", "step-00000010")]
    assert prune_training_checkpoints(run, keep_last=1, dry_run=True) == expected
    assert steps_in(run) == [5, 10, 15]
    assert prune_training_checkpoints(run, keep_last=1) == expected
    assert steps_in(run) == [15]


def test_pruning_by_hand_keeps_what_the_run_would_go_on_from(run, folder):
    content = bytearray((folder / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "optimizer.safetensors").write_bytes(content)
    assert [removed.name for removed in prune_run(run, keep_last=1)] == ["step-00000005"]
    assert newest_valid_checkpoint(run).name == "step-00000010"


def test_nothing_is_removed_while_a_run_holds_the_folder(run):
    with hold_run_folder(run), pytest.raises(ConfigError, match="is in use by another run"):
        prune_run(run, keep_last=1)
    assert steps_in(run) == [5, 10, 15]
    assert prune_run(run, keep_last=1)


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    for _ in range(2):
        with hold_run_folder(tmp_path):
            with pytest.raises(ConfigError, match="is in use by another run"), hold_run_folder(tmp_path):
                pass
            assert (tmp_path / ".lock").exists()
    with FileLock(tmp_path / ".lock", blocking=False):
        pass


def test_a_folder_without_checkpoints_is_not_pruned(tmp_path):
    with pytest.raises(CheckpointError, match="holds no training checkpoint; give the out_dir of a run"):
        prune_run(tmp_path, keep_last=1)
    assert not list(tmp_path.iterdir())
