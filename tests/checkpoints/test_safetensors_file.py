import pytest
import safetensors.torch
import torch

from rwkv_train.checkpoints.tensor_files import TensorFiles, write_tensor_files
from rwkv_train.checkpoints.tensor_source import TensorSource
from rwkv_train.errors import CheckpointError


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(7, 3, generator=generator).bfloat16(), "b": torch.randn(50, generator=generator)}


def write(folder, tensors):
    assert write_tensor_files(folder, "x", TensorSource.of(tensors)) == ["x.safetensors"]
    return folder / "x.safetensors"


def test_what_is_written_the_safetensors_package_reads(tmp_path):
    more = {
        "transposed": torch.arange(6.0).view(2, 3).T,
        "half": torch.tensor([[1.5], [-0.0], [torch.inf]]).half(),
    }
    read = safetensors.torch.load_file(write(tmp_path, {**some_tensors(), **more}))
    assert read["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    for name, tensor in {**some_tensors(), **more}.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_a_wide_tensor_after_an_odd_number_of_narrow_ones_is_mapped_where_it_lies(tmp_path):
    write(tmp_path, some_tensors())
    read = TensorFiles(tmp_path, ["x.safetensors"])
    assert all(read[name].equal(tensor) for name, tensor in some_tensors().items())
    assert all(read[name].data_ptr() % tensor.element_size() == 0 for name, tensor in some_tensors().items())


def test_tensors_that_share_memory_are_written_one_by_one(tmp_path):
    x = torch.arange(6.0)
    read = safetensors.torch.load_file(
        write(tmp_path, {"whole": x, "again": x, "part": x[2:4], "grid": x.view(2, 3)})
    )
    assert read["whole"].tolist() == read["again"].tolist() == [0, 1, 2, 3, 4, 5]
    assert read["part"].tolist() == [2, 3]
    assert read["grid"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_file_cut_at_any_length_is_refused(tmp_path):
    path = write(tmp_path, some_tensors())
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"truncated or damaged"):
            TensorFiles(tmp_path, ["x.safetensors"])
