import pickle

import pytest
import torch
from safetensors.torch import save_file

from rwkv_train.checkpoints.formats import Format, recognize_format
from rwkv_train.checkpoints.hub import resolve_path
from rwkv_train.errors import CheckpointError


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "model", "model.txt"])
def test_a_file_is_recognized_whatever_its_name(tmp_path, name):
    path = tmp_path / name
    torch.save({"a": torch.zeros(2)}, path)
    assert recognize_format(path) is Format.PTH
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    assert recognize_format(path) is Format.LEGACY_PTH
    save_file({"a": torch.zeros(2)}, path)
    assert recognize_format(path) is Format.SAFETENSORS_FILE


@pytest.mark.parametrize("table", ['{"a":1}', '{ "a":1}', '{\n"a":1}', "{}"])
def test_a_safetensors_file_is_recognized_however_its_table_is_laid_out(tmp_path, table):
    (tmp_path / "x").write_bytes(len(table).to_bytes(8, "little") + table.encode())
    assert recognize_format(tmp_path / "x") is Format.SAFETENSORS_FILE


@pytest.mark.parametrize(
    ("entries", "kind"),
    [
        (["model.safetensors", "config.json"], Format.SAFETENSORS_FOLDER),
        (["model.safetensors", "optimizer.safetensors", "manifest.json"], Format.TRAINING_CHECKPOINT),
        (["checkpoints", "metrics.csv"], Format.RUN),
        (["latest", "zero_to_fp32.py"], Format.DEEPSPEED_FOLDER),
        (["mp_rank_00_model_states.pt"], Format.DEEPSPEED_FOLDER),
        (["bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt"], Format.DEEPSPEED_FOLDER),
        (["latest", "model.safetensors"], Format.SAFETENSORS_FOLDER),
    ],
    ids=lambda value: value.name if isinstance(value, Format) else "",
)
def test_a_folder_is_recognized_by_its_entries(tmp_path, entries, kind):
    for entry in entries:
        (tmp_path / entry).touch()
    assert recognize_format(tmp_path) is kind


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
        (pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"<!doctype html><html>", "a web page"),
        (b"hello", "is not a checkpoint"),
    ],
    ids=["empty", "gguf", "pickle", "lfs", "html", "text"],
)
def test_a_foreign_file_is_refused_by_what_it_is(tmp_path, content, sentence):
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=sentence):
        recognize_format(tmp_path / "model.pth")


def test_files_of_torch_save_are_told_apart_by_their_keys(tmp_path):
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2"}, tmp_path / "x")
    assert recognize_format(tmp_path / "x") is Format.LIGHTNING_CKPT
    # Lightning's strategy writes both keys.
    torch.save({"module": {}, "pytorch-lightning_version": "2", "ds_version": "0.19"}, tmp_path / "x")
    with pytest.raises(CheckpointError, match=rf"one of the files of a DeepSpeed .* folder {tmp_path}$"):
        recognize_format(tmp_path / "x")


def test_a_folder_without_anything_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: .*model.safetensors.*manifest.json"):
        recognize_format(tmp_path)


def test_a_folder_of_sharded_foreign_weights_is_refused(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"has a config.json but no model.safetensors"):
        recognize_format(tmp_path)


def test_a_device_is_refused():
    with pytest.raises(CheckpointError, match=r"neither a file nor a folder"):
        recognize_format(resolve_path("/dev/null"))


def test_a_link_counts_as_what_it_points_to(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "x")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert recognize_format(resolve_path(tmp_path / "link")) is Format.PTH


def test_a_path_with_nothing_there_is_refused(tmp_path):
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"there is no such file or folder$"):
        resolve_path(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"a symbolic link to something that is not there"):
        resolve_path(tmp_path / "broken")
    with pytest.raises(CheckpointError, match=r"is not a path|no such file"):
        resolve_path("x" * 5000)
