import hashlib
import json
import logging
import resource
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from rwkv_train.checkpoints import (
    checkpoint_bytes,
    list_training_checkpoints,
    load_training_checkpoint,
    newest_valid_checkpoint,
    require_space,
    save_training_checkpoint,
)
from rwkv_train.checkpoints.descriptions import parse_model
from rwkv_train.checkpoints.io import NEW_PREFIX, OLD_PREFIX
from rwkv_train.checkpoints.manifest import write_manifest
from rwkv_train.errors import CheckpointError

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors"]


def save(out_dir, state):
    return save_training_checkpoint(out_dir, state.manifest, state.parameters())


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


def assert_same_state(read, written):
    for part in ("weights", "exp_avg", "exp_avg_sq"):
        assert getattr(read, part).keys() == getattr(written, part).keys()
        for name, tensor in getattr(written, part).items():
            assert getattr(read, part)[name].view(torch.int32).equal(tensor.view(torch.int32)), (part, name)
    assert read.manifest.items() >= written.manifest.items()


def edit_json(path, **changes):
    """Change a manifest, its own hash with it."""
    content = json.loads(path.read_text()) | changes
    write_manifest(path.parent, {key: value for key, value in content.items() if value != "absent"})


def rehash(folder):
    """Make the manifest agree with files that a test has changed."""
    names = [name for name in FILES if name.endswith("safetensors")]
    edit_json(
        folder / "manifest.json",
        files={name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names},
    )


def damage(path, position=0.5):
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("arch", ["rwkv4", "rwkv7"])
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, training_state, arch):
    folder = save(tmp_path, training_state(500, arch))
    assert folder == tmp_path / "checkpoints" / "step-00000500"
    assert names_in(folder) == FILES
    assert_same_state(load_training_checkpoint(folder), training_state(500, arch))


def test_tensors_are_named_as_documented(folder, training_state):
    state = training_state(15)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    moments = safetensors.torch.load_file(folder / "optimizer.safetensors")
    assert weights.keys() == state.weights.keys()
    assert moments["exp_avg.head.weight"].equal(state.exp_avg["head.weight"])
    assert moments["exp_avg_sq.head.weight"].equal(state.exp_avg_sq["head.weight"])
    assert len(moments) == 2 * len(state.exp_avg)


def test_keys_that_the_caller_adds_are_kept(tmp_path, training_state):
    state = training_state(5)
    state.manifest["validation"] = {"loss": 1.25, "text": "ünïcode"}
    folder = save(tmp_path, state)
    assert load_training_checkpoint(folder).manifest["validation"] == {"loss": 1.25, "text": "ünïcode"}


def test_loaded_tensors_can_be_changed_without_changing_the_file(folder):
    state = load_training_checkpoint(folder)
    for tensors in state[:3]:
        for tensor in tensors.values():
            tensor.zero_()
    assert load_training_checkpoint(folder).weights["head.weight"].any()


def test_checkpoints_are_listed_by_step(run, training_state):
    save(run, training_state(123_456_789))
    listed = [folder.name for folder in list_training_checkpoints(run)]
    assert listed == ["step-00000005", "step-00000010", "step-00000015", "step-123456789"]


def test_a_run_that_has_saved_nothing_has_no_checkpoint(tmp_path):
    assert list_training_checkpoints(tmp_path / "not-yet") == []
    assert newest_valid_checkpoint(tmp_path / "not-yet") is None


@pytest.mark.parametrize("missing", FILES)
def test_an_incomplete_folder_is_not_listed_and_not_loaded(run, folder, missing):
    (folder / missing).unlink()
    assert [found.name for found in list_training_checkpoints(run)] == ["step-00000005", "step-00000010"]
    with pytest.raises(CheckpointError, match=f"{missing} cannot be read: No such file"):
        load_training_checkpoint(folder)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "missing"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_that_names_the_file(
    run, folder, training_state, caplog, file, how
):
    path = folder / file
    match how:
        case "flipped":
            damage(path, position=0.0 if file == "manifest.json" else 0.5)
        case "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "empty":
            path.write_bytes(b"")
        case "missing":
            path.unlink()
    with caplog.at_level(logging.WARNING):
        newest = newest_valid_checkpoint(run)
    assert newest == run / "checkpoints" / "step-00000010"
    assert_same_state(load_training_checkpoint(newest), training_state(10))
    assert "passed over a damaged checkpoint" in caplog.text
    assert f"step-00000015/{file}" in caplog.text
    with pytest.raises(CheckpointError, match=file):
        load_training_checkpoint(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_every_flipped_bit_of_the_tensors_is_found(folder, file):
    whole = (folder / file).read_bytes()
    for position in range(0, len(whole), len(whole) // 30):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        (folder / file).write_bytes(flipped)
        with pytest.raises(CheckpointError, match=f"{file} is damaged"):
            load_training_checkpoint(folder)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(run):
    for folder in list_training_checkpoints(run):
        damage(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"every checkpoint in it is damaged \(3\)"):
        newest_valid_checkpoint(run)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"step": "absent"}, r"it has no 'step' \(int\)"),
        ({"step": 1.5}, "'step' is 1.5, not of type int"),
        ({"tokens": -1}, "'tokens' is -1, which must not be negative"),
        ({"config": []}, r"'config' is \[\], not of type dict"),
        ({"random": None}, "'random' is null, not of type dict"),
        ({"data": "absent"}, "it has no 'data'"),
        ({"tokenizer": {"name": 3}}, "'tokenizer' is"),
        ({"files": {"model.safetensors": "0", "optimizer.safetensors": "0"}}, "model.safetensors is damaged"),
        ({"files": {}}, "'files' does not name model.safetensors"),
        ({"save_number": "1"}, "'save_number' is '1'"),
        ({"arch_config": {"arch": "rwkv4", "n_layer": 2, "n_embd": 32, "vocab_size": 60}}, "is missing"),
        ({"arch_config": {"arch": "rwkv7", "n_layer": "2"}}, "model.n_layer is '2'"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(folder, changes, sentence):
    edit_json(folder / "manifest.json", **changes)
    with pytest.raises(CheckpointError, match=sentence):
        load_training_checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        (
            "model.safetensors",
            {"head.weight": torch.zeros(60, 32).bfloat16()},
            "'head.weight' is torch.bfloat16",
        ),
        ("model.safetensors", {"head.weight": torch.zeros(60, 31)}, r"'head.weight' has shape \[60, 31\]"),
        ("model.safetensors", {"extra": torch.zeros(1)}, "'extra' .* is extra"),
        ("optimizer.safetensors", {"exp_avg.extra": torch.zeros(1)}, "'exp_avg.extra' has no weight"),
        (
            "optimizer.safetensors",
            {"sum.head.weight": torch.zeros(60, 32)},
            "'sum.head.weight' has no weight",
        ),
        (
            "optimizer.safetensors",
            {"exp_avg.blocks.0.att.v0": torch.zeros(1, 1, 32)},
            "no second moment to go with it",
        ),
        (
            "optimizer.safetensors",
            {"exp_avg.head.weight": torch.zeros(2, 2)},
            r"has shape \[2, 2\], expected \[60, 32\]",
        ),
    ],
    ids=["dtype", "shape", "extra", "no-weight", "no-moment", "half-a-pair", "moment-shape"],
)
def test_tensors_that_do_not_fit_are_refused_though_their_hash_is_right(folder, file, change, sentence):
    tensors = safetensors.torch.load_file(folder / file)
    safetensors.torch.save_file({**tensors, **change}, folder / file)
    rehash(folder)
    with pytest.raises(CheckpointError, match=sentence):
        load_training_checkpoint(folder)


def test_a_checkpoint_of_the_same_step_is_replaced(run, training_state):
    other = training_state(15)
    other.manifest["tokens"] = 7
    save(run, other)
    assert load_training_checkpoint(run / "checkpoints" / "step-00000015").manifest["tokens"] == 7
    assert names_in(run / "checkpoints") == ["step-00000005", "step-00000010", "step-00000015"]


@pytest.mark.parametrize("step", [15, 20], ids=["same-step", "next-step"])
def test_a_save_killed_at_any_moment_loses_nothing(tmp_path, training_state, die_after, killed, step):
    for n in range(60):
        out_dir = tmp_path / str(n)
        save(out_dir, training_state(15))
        new = training_state(step)
        new.manifest["tokens"] = 7
        try:
            with die_after(n):
                save(out_dir, new)
        except killed:
            newest = newest_valid_checkpoint(out_dir)
            assert newest == list_training_checkpoints(out_dir)[-1]
            state = load_training_checkpoint(newest)
            is_new = state.manifest["tokens"] == 7
            assert_same_state(state, new if is_new else training_state(15))
            # The next save clears away what the killed one left, and puts back what it had set aside.
            save(out_dir, training_state(25))
            assert not [name for name in names_in(out_dir / "checkpoints") if name.startswith(".")]
            assert len(list_training_checkpoints(out_dir)) == len({15, 25} | ({step} if is_new else set()))
        else:
            break
        shutil.rmtree(out_dir)
    assert 10 < n < 59


@pytest.mark.parametrize(
    "name", [f"{NEW_PREFIX}0123abcd-step-00000020", f"{OLD_PREFIX}step-00000015"], ids=["new", "old"]
)
def test_leftovers_of_killed_saves_are_removed_by_the_next_one(run, folder, training_state, name):
    shutil.copytree(folder, folder.with_name(name))
    assert len(list_training_checkpoints(run)) == 3
    save(run, training_state(25))
    assert len(names_in(run / "checkpoints")) == 4
    assert name not in names_in(run / "checkpoints")


def test_a_failed_save_leaves_older_checkpoints_and_nothing_else(run, training_state, monkeypatch):
    def refuse(path, content, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    with pytest.raises(CheckpointError, match="step-00000020 cannot be written: No space left on device"):
        save(run, training_state(20))
    assert names_in(run / "checkpoints") == ["step-00000005", "step-00000010", "step-00000015"]


def test_a_file_where_the_checkpoints_belong_is_refused(tmp_path, training_state):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path, training_state(5))


def test_a_linked_out_dir_is_saved_to_and_read_from(tmp_path, training_state):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    save(tmp_path / "run", training_state(5))
    assert newest_valid_checkpoint(tmp_path / "run").resolve() == tmp_path / "disk/checkpoints/step-00000005"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.manifest.pop("tokens"), "it has no 'tokens'"),
        (lambda state: [part.pop("head.weight") for part in state[:3]], "'head.weight' is missing"),
        (lambda state: state.weights.update({"head.weight": torch.zeros(60, 31)}), r"shape \[60, 31\]"),
        (lambda state: state.exp_avg.pop("head.weight"), "'exp_avg_sq.head.weight' has no weight or no"),
        (lambda state: state.exp_avg.update(a=torch.zeros(1)), "'exp_avg.a' has no weight"),
        (lambda state: state.weights.update(a=torch.zeros(1)), "'a' .* is extra"),
        (
            lambda state: state.exp_avg.update({"emb.weight": torch.zeros(60, 32).double()}),
            "is torch.float64",
        ),
        (lambda state: state.exp_avg.update({"emb.weight": torch.zeros(60, 32).long()}), "is torch.int64"),
    ],
    ids=["manifest", "weight", "shape", "half-a-pair", "moment", "extra", "too-wide", "integer"],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, training_state, change, sentence):
    state = training_state(5)
    change(state)
    with pytest.raises(ValueError, match=sentence):
        save(tmp_path, state)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_nan_in_a_manifest_is_refused_and_leaves_nothing(run, training_state):
    state = training_state(20)
    state.manifest["loss"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(run, state)
    assert names_in(run / "checkpoints") == ["step-00000005", "step-00000010", "step-00000015"]


def test_after_going_back_by_hand_the_new_branch_is_resumed(run, training_state):
    save(run, training_state(7))
    assert newest_valid_checkpoint(run).name == "step-00000007"


@contextmanager
def files_limited_to(n_bytes):
    """A disk on which a file can be only so long: the system refuses in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("n_bytes", [0, 10_000, 200_000], ids=["at-once", "in-the-weights", "in-the-moments"])
def test_a_disk_that_fills_during_a_save_leaves_what_was_there(run, training_state, n_bytes):
    state = training_state(20)
    before = sorted(run.rglob("*"))
    with files_limited_to(n_bytes), pytest.raises(CheckpointError, match="step-00000020 cannot be written"):
        save_training_checkpoint(run, state.manifest, state.parameters())
    assert sorted(run.rglob("*")) == before
    assert newest_valid_checkpoint(run).name == "step-00000015"


def test_a_save_that_has_no_room_is_refused_before_it_writes(run, training_state, monkeypatch):
    state = training_state(20)
    n_bytes = 12 * sum(weight.numel() for weight in state.weights.values())
    free = n_bytes + 500_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert checkpoint_bytes(parse_model(run, state.manifest["arch_config"])) == n_bytes
    given = state.parameters()
    with pytest.raises(CheckpointError, match=r"it needs 1 MB and its disk has 1 MB free; free some space"):
        save_training_checkpoint(run, state.manifest, given)
    assert len(list(given)) == len(state.weights)


def test_the_room_for_a_run_can_be_asked_for_before_its_folder_is_there(tmp_path, monkeypatch):
    asked = []

    def disk_usage(path):
        asked.append(path)
        return SimpleNamespace(free=3_000_000_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    require_space(tmp_path / "not" / "yet", 2_900_000_000)
    assert asked == [tmp_path]
    with pytest.raises(
        CheckpointError, match=r"yet cannot be written: it needs 3,101 MB .* has 3,000 MB free"
    ):
        require_space(tmp_path / "not" / "yet", 3_100_000_000)
