import pytest
import safetensors.torch
import torch

from rwkv_train.checkpoints.safetensors_file import read_safetensors, save_safetensors
from rwkv_train.errors import CheckpointError


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(7, 3, generator=generator), "b": torch.randn(50, generator=generator).bfloat16()}


def test_what_is_written_the_safetensors_package_reads(tmp_path):
    save_safetensors(tmp_path / "x", {**some_tensors(), "transposed": torch.arange(6.0).view(2, 3).T})
    read = safetensors.torch.load_file(tmp_path / "x")
    assert read["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert torch.equal(read["a"], some_tensors()["a"])
    assert torch.equal(read["b"], some_tensors()["b"])


def test_tensors_that_share_memory_are_written_one_by_one(tmp_path):
    x = torch.arange(6.0)
    save_safetensors(tmp_path / "x", {"whole": x, "again": x, "part": x[2:4], "grid": x.view(2, 3)})
    read = safetensors.torch.load_file(tmp_path / "x")
    assert read["whole"].tolist() == read["again"].tolist() == [0, 1, 2, 3, 4, 5]
    assert read["part"].tolist() == [2, 3]
    assert read["grid"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_file_cut_at_any_length_is_refused(tmp_path):
    save_safetensors(tmp_path / "whole", some_tensors())
    whole = (tmp_path / "whole").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "x").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"truncated or damaged"):
            read_safetensors(tmp_path / "x")


def test_a_full_disk_is_one_sentence(tmp_path):
    resource = pytest.importorskip("resource", reason="needs a limit on file sizes, which Windows lacks")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"x cannot be written"):
            save_safetensors(tmp_path / "x", {"a": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
