import hashlib
import json
import re

import pytest
import safetensors.torch
import torch

from rwkv_train.checkpoints import (
    decode_random_state,
    encode_random_state,
    list_training_checkpoints,
    load_training_checkpoint,
    newest_valid_checkpoint,
    save_training_checkpoint,
)
from rwkv_train.checkpoints.manifest import read_manifest, write_manifest
from rwkv_train.errors import CheckpointError


def test_every_flipped_bit_of_a_manifest_is_found(folder):
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=re.escape("manifest.json")):
            read_manifest(folder)


def test_a_digit_that_was_changed_is_found(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"tokens": 15000', '"tokens": 15001'))
    with pytest.raises(
        CheckpointError, match=r"manifest\.json is damaged: its SHA-256 is \w+, but it says \w+"
    ):
        read_manifest(folder)


def test_the_hash_of_a_manifest_is_that_of_its_text_with_zeros_in_place_of_it(folder):
    text = (folder / "manifest.json").read_text()
    stated = json.loads(text)["sha256"]
    assert hashlib.sha256(text.replace(stated, 64 * "0").encode()).hexdigest() == stated


@pytest.mark.parametrize("stated", [None, "", "0" * 63, "0" * 64, 3], ids=str)
def test_a_manifest_without_its_own_hash_is_refused(folder, stated):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": stated}))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(folder)


def test_what_is_written_twice_has_one_hash(folder):
    before = (folder / "manifest.json").read_bytes()
    write_manifest(folder, read_manifest(folder))
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("version", ["rwkv-train/0", "rwkv-train/3", None])
def test_a_manifest_of_another_version_is_refused_by_name(folder, version):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": version}))
    with pytest.raises(CheckpointError, match=f"its format is {version!r}, but this version reads"):
        read_manifest(folder)


def write_as_before(folder, state):
    """Write a checkpoint of the first version: one file of each kind, a manifest without a hash of its own."""
    folder.mkdir(parents=True)
    moments = {
        f"{kind}.{name}": tensor
        for kind in ("exp_avg", "exp_avg_sq")
        for name, tensor in getattr(state, kind).items()
    }
    safetensors.torch.save_file(state.weights, folder / "model.safetensors", metadata={"format": "pt"})
    safetensors.torch.save_file(moments, folder / "optimizer.safetensors", metadata={"format": "pt"})
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    manifest = {"format": "rwkv-train/1", **state.manifest, "files": hashes, "save_number": 4}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def test_a_checkpoint_of_the_first_version_is_read_and_a_run_goes_on_from_it(tmp_path, training_state):
    state = training_state(20)
    folder = tmp_path / "checkpoints" / "step-00000020"
    write_as_before(folder, state)
    assert newest_valid_checkpoint(tmp_path) == folder
    read = load_training_checkpoint(folder)
    for part in ("weights", "exp_avg", "exp_avg_sq"):
        assert getattr(read, part).keys() == getattr(state, part).keys()
        assert all(tensor.equal(getattr(state, part)[name]) for name, tensor in getattr(read, part).items())
    new = save_training_checkpoint(tmp_path, state.manifest | {"step": 10}, state.parameters())
    assert read_manifest(new)["save_number"] == 5
    assert newest_valid_checkpoint(tmp_path) == new
    assert list_training_checkpoints(tmp_path) == [new, folder]


def test_a_manifest_cut_at_any_length_is_refused(folder):
    whole = (folder / "manifest.json").read_bytes()
    for length in range(0, len(whole) - 2, 17):
        (folder / "manifest.json").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            read_manifest(folder)


def test_a_random_state_comes_back(tmp_path):
    generator = torch.Generator().manual_seed(3)
    saved = json.loads(json.dumps(encode_random_state(generator.get_state())))
    expected = torch.rand(4, generator=generator)
    generator.set_state(decode_random_state(saved))
    assert torch.rand(4, generator=generator).equal(expected)


@pytest.mark.parametrize("text", ["a", "ÿÿÿÿ", "====", None, 3])
def test_a_damaged_random_state_is_refused(text):
    with pytest.raises(CheckpointError, match="random state"):
        decode_random_state(text)
