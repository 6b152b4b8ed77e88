"""Training checkpoints whose tensors are spread over several files."""

import json
import math
import shutil

import pytest
import safetensors.torch
import torch

from rwkv_train.checkpoints import (
    ParameterState,
    load_training_checkpoint,
    newest_valid_checkpoint,
    open_training_checkpoint,
    read_weights,
    save_training_checkpoint,
)
from rwkv_train.checkpoints.manifest import write_manifest
from rwkv_train.checkpoints.tensor_files import is_tensor_file, tensor_file_names
from rwkv_train.errors import CheckpointError
from rwkv_train.models.registry import build_model

MAX_FILE_BYTES = 20_000


def save(out_dir, state, max_file_bytes=MAX_FILE_BYTES):
    return save_training_checkpoint(
        out_dir, state.manifest, state.parameters(), max_file_bytes=max_file_bytes
    )


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture
def sharded(tmp_path, training_state):
    """A checkpoint of step 10 in many files, and one of step 5 before it."""
    save(tmp_path, training_state(5))
    return save(tmp_path, training_state(10))


@pytest.mark.parametrize("arch", ["rwkv4", "rwkv7"])
@pytest.mark.parametrize("max_file_bytes", [1, 5_000, 20_000, 10**9])
def test_a_checkpoint_in_files_of_any_size_comes_back_bit_for_bit(
    tmp_path, training_state, arch, max_file_bytes
):
    state = training_state(10, arch)
    read = load_training_checkpoint(save(tmp_path, state, max_file_bytes))
    for part in ("weights", "exp_avg", "exp_avg_sq"):
        written = getattr(state, part)
        assert getattr(read, part).keys() == written.keys()
        assert all(tensor.equal(written[name]) for name, tensor in getattr(read, part).items())


@pytest.mark.parametrize("stem", ["model", "optimizer"])
def test_files_are_as_large_as_allowed_and_the_index_says_where_a_tensor_is(sharded, stem):
    files = sorted(sharded.glob(f"{stem}-*.safetensors"))
    index = json.loads((sharded / f"{stem}.safetensors.index.json").read_text())
    content = [safetensors.torch.load_file(file) for file in files]
    sizes = [[tensor.nbytes for tensor in tensors.values()] for tensors in content]
    assert [file.name for file in files] == [
        f"{stem}-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))
    ]
    assert len(files) >= math.ceil(sum(map(sum, sizes)) / MAX_FILE_BYTES) > 1
    assert all(sum(of_file) <= MAX_FILE_BYTES for of_file in sizes)
    assert index["metadata"] == {"total_size": sum(map(sum, sizes))}
    assert index["weight_map"] == {
        name: file.name for file, tensors in zip(files, content, strict=True) for name in tensors
    }


def test_a_tensor_that_is_larger_than_a_file_may_be_has_one_of_its_own(tmp_path, training_state):
    state = training_state(10)
    folder = save(tmp_path, state, max_file_bytes=1)
    assert len(list(folder.glob("model-*.safetensors"))) == len(state.weights)
    assert len(list(folder.glob("optimizer-*.safetensors"))) == 2 * len(state.exp_avg)


def test_the_weights_of_a_checkpoint_in_many_files_are_read_by_every_command(sharded, training_state):
    for path in (sharded, sharded.parents[1]):
        tensors = read_weights(path).tensors
        assert all(tensors[name].equal(weight) for name, weight in training_state(10).weights.items())


@pytest.mark.parametrize("name", ["head.weight", "blocks.0.att.v0"], ids=["trained", "never-updated"])
def test_one_parameter_is_read_with_its_moments(sharded, training_state, name):
    state = training_state(10)
    read = open_training_checkpoint(sharded).parameter(name)
    assert read.name == name
    assert read.weight.equal(state.weights[name])
    if name in state.exp_avg:
        assert read.exp_avg.equal(state.exp_avg[name])
        assert read.exp_avg_sq.equal(state.exp_avg_sq[name])
    else:
        assert (read.exp_avg, read.exp_avg_sq) == (None, None)


def test_an_opened_checkpoint_gives_names_in_the_order_of_the_model_and_weights_to_change(
    sharded, training_state, config_of
):
    checkpoint = open_training_checkpoint(sharded)
    assert list(checkpoint.names) == list(
        build_model(config_of("rwkv7"), wkv_backend="reference").state_dict()
    )
    weights = checkpoint.weights()
    assert all(weight.equal(training_state(10).weights[name]) for name, weight in weights.items())
    weights["head.weight"].zero_()
    assert checkpoint.parameter("head.weight").weight.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_tensors_and_views_are_stored_as_the_float32_that_they_are(tmp_path, training_state, dtype):
    state = training_state(10)
    narrow = {name: weight.to(dtype) for name, weight in state.weights.items()}
    parameters = [
        ParameterState(name, weight.mT.contiguous().mT if weight.dim() > 1 else weight, None, None)
        for name, weight in narrow.items()
    ]
    folder = save_training_checkpoint(tmp_path, state.manifest, parameters)
    read = load_training_checkpoint(folder)
    assert all(weight.equal(narrow[name].float()) for name, weight in read.weights.items())
    assert read.exp_avg == read.exp_avg_sq == {}


def test_parameters_are_taken_one_at_a_time(tmp_path, training_state):
    alive = 0
    highest = 0

    class Counted(torch.Tensor):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def parameters():
        nonlocal alive, highest
        for name, weight, exp_avg, exp_avg_sq in training_state(10).parameters():
            alive += 1
            highest = max(highest, alive)
            yield ParameterState(name, weight.as_subclass(Counted), exp_avg, exp_avg_sq)

    save_training_checkpoint(tmp_path, training_state(10).manifest, parameters())
    assert highest <= 2  # the one that is written and the one that is made


@pytest.mark.parametrize("after", [0, 1, 30])
def test_parameters_that_fail_leave_nothing_and_are_not_closed(sharded, training_state, after):
    def parameters():
        for number, parameter in enumerate(training_state(15).parameters()):
            if number == after:
                yield ParameterState("surprise", parameter.weight, None, None)
            yield parameter

    given = parameters()
    before = sorted(sharded.parents[1].rglob("*"))
    with pytest.raises(ValueError, match=r"'surprise' .* is extra"):
        save_training_checkpoint(sharded.parents[1], training_state(15).manifest, given, max_file_bytes=1)
    assert sorted(sharded.parents[1].rglob("*")) == before
    assert len(list(given)) == len(training_state(15).weights) - after


def test_two_parameters_of_one_name_are_refused(tmp_path, training_state):
    parameters = [*training_state(10).parameters(), *training_state(5).parameters()]
    with pytest.raises(ValueError, match=r"there are two tensors 'emb.weight'"):
        save_training_checkpoint(tmp_path, training_state(10).manifest, parameters)


def test_every_file_has_a_hash(sharded):
    names = {path.name for path in sharded.iterdir()}
    assert manifest_of(sharded)["files"].keys() == names - {"manifest.json"}
    assert {"model.safetensors.index.json", "optimizer.safetensors.index.json"} <= names


@pytest.mark.parametrize("kind", ["one-of-each", "many"])
def test_a_flipped_bit_in_any_file_is_found_and_the_checkpoint_before_it_taken(
    tmp_path, training_state, kind, caplog
):
    max_file_bytes = {"one-of-each": 10**9, "many": 60_000}[kind]
    before = save(tmp_path, training_state(5), max_file_bytes)
    folder = save(tmp_path, training_state(10), max_file_bytes)
    files = sorted(folder.iterdir())
    assert len(files) >= {"one-of-each": 3, "many": 9}[kind]
    for file in files:
        whole = file.read_bytes()
        for position in (0, len(whole) // 3, len(whole) // 2, len(whole) - 1):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << position % 8
            file.write_bytes(flipped)
            caplog.clear()
            assert newest_valid_checkpoint(tmp_path) == before
            assert f"{folder.name}/{file.name}" in caplog.text
            with pytest.raises(CheckpointError, match=file.name):
                open_training_checkpoint(folder)
        file.write_bytes(whole)
    assert newest_valid_checkpoint(tmp_path) == folder


def test_every_missing_file_is_found_and_named(sharded, caplog):
    for file in sorted(sharded.iterdir()):
        content = file.read_bytes()
        file.unlink()
        caplog.clear()
        assert newest_valid_checkpoint(sharded.parents[1]).name == "step-00000005"
        assert f"{file.name} cannot be read: No such file" in caplog.text
        file.write_bytes(content)


def test_a_file_that_the_manifest_does_not_name_is_missed(sharded):
    manifest = manifest_of(sharded)
    name = next(name for name in manifest["files"] if name.startswith("model-00002-of-"))
    del manifest["files"][name]
    write_manifest(sharded, manifest)
    with pytest.raises(CheckpointError, match=f"'files' does not name {name}"):
        open_training_checkpoint(sharded)


def test_a_tensor_in_two_files_is_refused(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match=f"{second.name}: tensor .* is in {first.name} too"):
        open_training_checkpoint(sharded, verify=False)


def test_damage_to_the_optimizer_does_not_hide_the_weights(sharded):
    next(sharded.glob("optimizer-*.safetensors")).write_bytes(b"")
    assert read_weights(sharded.parents[1]).step == 10


def test_a_save_in_many_files_that_is_killed_at_any_moment_loses_nothing(
    tmp_path, training_state, die_after, killed
):
    for n in range(60):
        out_dir = tmp_path / str(n)
        save(out_dir, training_state(5), max_file_bytes=10**9)
        try:
            with die_after(n):
                save(out_dir, training_state(10), max_file_bytes=100_000)
        except killed:
            newest = newest_valid_checkpoint(out_dir)
            step = open_training_checkpoint(newest, verify=False).manifest["step"]
            assert step in {5, 10}
            expected = training_state(step).weights
            assert all(
                w.equal(expected[name]) for name, w in load_training_checkpoint(newest).weights.items()
            )
            save(out_dir, training_state(15), max_file_bytes=10**9)
            assert not list((out_dir / "checkpoints").glob(".*"))
        else:
            break
        shutil.rmtree(out_dir)
    assert 15 < n < 59


@pytest.mark.parametrize("number", ["00000", "999999999", "9" * 100, "0000\u0662"])
def test_a_made_up_number_of_files_takes_no_time(number):
    listed = [f"model-00001-of-{number}.safetensors"]
    names = tensor_file_names("model", listed)
    assert 1 <= len(names) <= 2
    assert not set(names) <= set(listed)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.safetensors", True),
        ("model.safetensors.index.json", True),
        ("model-00002-of-00003.safetensors", True),
        ("model-00004-of-00003.safetensors", False),
        ("model-00001-of-00001.safetensors", False),
        ("optimizer.safetensors", False),
    ],
)
def test_names_of_files_are_told_from_others(name, expected):
    assert is_tensor_file("model", name) is expected
