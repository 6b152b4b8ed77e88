import pickle
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from rwkv_train.checkpoints.io import new_file
from rwkv_train.checkpoints.pth import mentions, read_pickle, read_pth, save_pth
from rwkv_train.checkpoints.stand_ins import StandIn
from rwkv_train.errors import CheckpointError


class Attack:
    """Unpickled without care, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(7, 3, generator=generator), "b": torch.randn(50, generator=generator).bfloat16()}


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def assert_same(read, written):
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("save", [torch.save, save_legacy], ids=["zip", "legacy"])
def test_files_of_torch_save_are_read(tmp_path, save):
    save(some_tensors(), tmp_path / "x")
    assert_same(read_pth(tmp_path / "x"), some_tensors())


@pytest.mark.parametrize("save", [torch.save, save_legacy], ids=["zip", "legacy"])
def test_a_name_of_another_format_does_not_matter(tmp_path, save):
    save(some_tensors(), tmp_path / "x.safetensors")
    assert_same(read_pth(tmp_path / "x.safetensors"), some_tensors())


def test_what_is_written_torch_load_reads(tmp_path):
    save_pth(tmp_path / "x", some_tensors())
    assert_same(torch.load(tmp_path / "x", weights_only=True), some_tensors())


def test_the_table_of_what_is_written_is_that_of_torch_save(tmp_path):
    save_pth(tmp_path / "ours", some_tensors())
    with (tmp_path / "theirs").open("wb") as file:
        torch.save(some_tensors(), file)
    ours, theirs = (zipfile.ZipFile(tmp_path / name) for name in ("ours", "theirs"))
    for record in ("archive/data.pkl", "archive/byteorder", "archive/version", "archive/data/1"):
        assert ours.read(record) == theirs.read(record)
    assert ours.testzip() is None


def test_values_start_where_processors_like_it_also_in_records_of_the_largest_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 90)  # instead of 2 GiB
    save_pth(tmp_path / "x", some_tensors())
    read = torch.load(tmp_path / "x", weights_only=True, mmap=True)
    assert_same(read, some_tensors())
    assert all(tensor.data_ptr() % 64 == 0 for tensor in read.values())


def test_the_same_tensors_give_the_same_bytes_whatever_the_name(tmp_path):
    for name in ("x.pth", ".hidden"):
        save_pth(tmp_path / name, some_tensors())
    assert (tmp_path / "x.pth").read_bytes() == (tmp_path / ".hidden").read_bytes()


def test_a_view_is_written_without_the_memory_behind_it(tmp_path):
    save_pth(tmp_path / "x", {"view": torch.zeros(1_000_000)[:10]})
    assert (tmp_path / "x").stat().st_size < 10_000


@pytest.mark.parametrize("save", [torch.save, save_legacy], ids=["zip", "legacy"])
def test_a_pickle_with_a_program_is_refused_and_does_not_run(tmp_path, save):
    save({**some_tensors(), "attack": Attack(tmp_path / "created")}, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"asks for more than tensors .*which is refused"):
        read_pth(tmp_path / "x")
    assert not (tmp_path / "created").exists()
    # The attack is real: without care the file appears.
    torch.load(tmp_path / "x", weights_only=False)
    assert (tmp_path / "created").exists()


def test_a_bare_pickle_with_a_program_is_refused_and_does_not_run(tmp_path):
    (tmp_path / "x").write_bytes(pickle.dumps(Attack(tmp_path / "created"), protocol=2))
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        read_pth(tmp_path / "x")
    assert not (tmp_path / "created").exists()


def test_what_another_library_has_allowed_is_refused_and_stays_allowed_for_it(tmp_path):
    torch.save({"settings": Namespace(lr=0.1)}, tmp_path / "x")
    with torch.serialization.safe_globals([Namespace]):
        with pytest.raises(CheckpointError, match=r"more than tensors \(argparse.Namespace\)"):
            read_pth(tmp_path / "x")
        assert torch.load(tmp_path / "x", weights_only=True) == {"settings": Namespace(lr=0.1)}


def test_a_saved_module_is_refused_by_its_name(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"more than tensors \(torch.nn.modules.linear.Linear\)"):
        read_pth(tmp_path / "x")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({"state_dict": some_tensors(), "epoch": 3}, "entry 'state_dict' is a dict"),
        ({"epoch": 3}, "entry 'epoch' is a int"),
        ({1: torch.zeros(1)}, "entry 1 is a Tensor"),
    ],
    ids=["list", "nested", "number", "unnamed"],
)
def test_anything_but_named_tensors_is_refused(tmp_path, content, sentence):
    torch.save(content, tmp_path / "x")
    with pytest.raises(CheckpointError, match=sentence):
        read_pth(tmp_path / "x")


@pytest.mark.parametrize("make", [torch.tensor, lambda _: Path("x")], ids=["tensor", "object"])
def test_only_names_that_are_given_get_a_stand_in(tmp_path, make):
    torch.save({"x": make([1.0])}, tmp_path / "x")
    read = read_pickle(tmp_path / "x", {"pathlib.PosixPath": StandIn})
    assert type(read["x"]) is (torch.Tensor if make is torch.tensor else StandIn)
    torch.save({"x": Namespace()}, tmp_path / "y")
    with pytest.raises(CheckpointError, match=r"\(argparse.Namespace\), which is refused"):
        read_pickle(tmp_path / "y", {"pathlib.PosixPath": StandIn})


@pytest.mark.parametrize("save", [torch.save, save_legacy], ids=["zip", "legacy"])
def test_a_key_is_found_without_unpickling(tmp_path, save):
    save({"ds_version": "1", "attack": Attack(tmp_path / "created")}, tmp_path / "x")
    assert mentions(tmp_path / "x", "ds_version") is (save is torch.save)
    assert not mentions(tmp_path / "x", "ds_versio")
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize(
    "damage", [b"PK\x03\x04", b"PK\x03\x04" + bytes(100), b""], ids=["cut", "zeros", "empty"]
)
def test_nothing_is_found_in_a_damaged_file(tmp_path, damage):
    (tmp_path / "x").write_bytes(damage)
    assert not mentions(tmp_path / "x", "ds_version")


@pytest.mark.parametrize("save", [torch.save, save_legacy], ids=["zip", "legacy"])
def test_a_file_cut_at_any_length_is_refused(tmp_path, save):
    save(some_tensors(), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        (tmp_path / "x").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_pth(tmp_path / "x")


def test_a_flipped_bit_in_a_record_is_found(tmp_path):
    torch.save(some_tensors(), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    with zipfile.ZipFile(tmp_path / "whole") as archive:
        records = [(whole.find(data), len(data)) for data in map(archive.read, archive.namelist()) if data]
    for start, length in records:
        for position in range(start, start + length, 29):
            flipped = bytearray(whole)
            flipped[position] ^= 0x10
            (tmp_path / "x").write_bytes(flipped)
            with pytest.raises(CheckpointError):
                read_pth(tmp_path / "x")


def test_no_flipped_byte_gives_other_weights_or_another_error(tmp_path):
    torch.save(some_tensors(), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    n_refused = 0
    for position in range(0, len(whole), 11):
        flipped = bytearray(whole)
        flipped[position] ^= 0xFF
        (tmp_path / "x").write_bytes(flipped)
        try:
            assert_same(read_pth(tmp_path / "x"), some_tensors())  # padding between records carries nothing
        except CheckpointError:
            n_refused += 1
    assert n_refused > 50


def test_a_full_disk_is_one_sentence(tmp_path):
    resource = pytest.importorskip("resource", reason="needs a limit on file sizes, which Windows lacks")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with (
            pytest.raises(CheckpointError, match=r"x cannot be written: File too large"),
            new_file(tmp_path / "x", 0) as new,
        ):
            save_pth(new, {"a": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(some_tensors(), tmp_path / "x")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_pth(tmp_path / "x"), some_tensors())


def test_a_compressed_record_is_refused(tmp_path):
    torch.save(some_tensors(), tmp_path / "whole")
    with (
        zipfile.ZipFile(tmp_path / "whole") as source,
        zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in source.namelist():
            bomb.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match=r"is compressed"):
        read_pth(tmp_path / "x")


def test_a_file_without_checksums_that_goes_on_after_its_end_is_refused(tmp_path):
    save_legacy(some_tensors(), tmp_path / "x")
    with (tmp_path / "x").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match=r"cannot be read .*: there is something after its end"):
        read_pth(tmp_path / "x")
