import shutil

import pytest

from rwkv_train.checkpoints.io import (
    NEW_PREFIX,
    OLD_PREFIX,
    new_file,
    new_folder,
    remove_folder,
    remove_leftovers,
    resolve_target,
    sha256_of,
)
from rwkv_train.errors import CheckpointError

MORE_THAN_ANY_CRASH_POINT = 40


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


def write_file(path, text):
    with new_file(path, len(text)) as new:
        new.write_text(text)


def write_folder(folder, text):
    with new_folder(folder, len(text)) as new:
        (new / "one").write_text(text)
        (new / "two").write_text(text)


def fail_within(writing, write_half, error):
    with writing as new:
        write_half(new)
        raise error


def test_a_file_gets_its_name_and_missing_folders_are_made(tmp_path):
    write_file(tmp_path / "a" / "b" / "x.pth", "text")
    assert (tmp_path / "a" / "b" / "x.pth").read_text() == "text"
    assert names_in(tmp_path / "a" / "b") == ["x.pth"]


def test_the_hash_is_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # The first example of FIPS 180-2.
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    write_file(tmp_path / "x", "old")
    with pytest.raises(error):
        fail_within(new_file(tmp_path / "x", 3), lambda new: new.write_text("half"), error)
    assert (tmp_path / "x").read_text() == "old"
    assert names_in(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    write_folder(tmp_path / "x", "old")
    with pytest.raises(error):
        fail_within(new_folder(tmp_path / "x", 3), lambda new: (new / "one").write_text("half"), error)
    assert (tmp_path / "x" / "two").read_text() == "old"
    assert names_in(tmp_path) == ["x"]


def test_a_replaced_folder_keeps_no_file_of_the_old_one(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "stale").touch()
    write_folder(tmp_path / "x", "new")
    assert names_in(tmp_path / "x") == ["one", "two"]
    assert names_in(tmp_path) == ["x"]


def test_a_file_killed_at_any_moment_is_the_old_or_the_new_one(tmp_path, die_after, killed):
    for n in range(MORE_THAN_ANY_CRASH_POINT):
        write_file(tmp_path / "x", "old")
        try:
            with die_after(n):
                write_file(tmp_path / "x", "newer")
        except killed:
            assert (tmp_path / "x").read_text() in {"old", "newer"}
        else:
            break
    assert 3 < n < MORE_THAN_ANY_CRASH_POINT - 1
    assert (tmp_path / "x").read_text() == "newer"
    assert names_in(tmp_path) == ["x"]


def test_a_folder_killed_at_any_moment_is_the_old_or_the_new_one_after_the_next_write_begins(
    tmp_path, die_after, killed
):
    for n in range(MORE_THAN_ANY_CRASH_POINT):
        write_folder(tmp_path / "x", "old")
        try:
            with die_after(n):
                write_folder(tmp_path / "x", "newer")
        except killed:
            remove_leftovers(tmp_path, lambda name: name == "x")
            texts = {(tmp_path / "x" / name).read_text() for name in ("one", "two")}
            assert texts in ({"old"}, {"newer"})
            assert names_in(tmp_path) == ["x"]
        else:
            break
    assert 6 < n < MORE_THAN_ANY_CRASH_POINT - 1


def test_leftovers_of_other_targets_stay(tmp_path):
    other = [f"{NEW_PREFIX}0123abcd-y", f"{NEW_PREFIX}0123abcd-x.old", f"{OLD_PREFIX}y"]
    for name in other:
        (tmp_path / name).touch()
    (tmp_path / f"{NEW_PREFIX}0123abcd-x").touch()
    write_file(tmp_path / "x", "text")
    assert names_in(tmp_path) == sorted([*other, "x"])


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    write_file(tmp_path / "x", "old")
    usage = shutil._ntuple_diskusage(total=10**9, used=10**9 - 5_000_000, free=5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 6 MB and its disk has 5 MB free"):
        new_file(tmp_path / "x", 5_000_000).__enter__()
    assert (tmp_path / "x").read_text() == "old"
    assert names_in(tmp_path) == ["x"]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/x cannot be written: .*\(.*file\)"):
        write_file(tmp_path / "file" / "x", "text")


def test_a_disk_that_refuses_to_write_is_one_sentence(tmp_path, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"x cannot be written: Read-only file system"):
        write_folder(tmp_path / "x", "text")


def test_a_symbolic_link_is_written_through(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "x")
    write_file(resolve_target(tmp_path / "link"), "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "x").read_text() == "text"


def test_a_loop_of_symbolic_links_is_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"form a loop"):
        resolve_target(tmp_path / "a")


def test_a_folder_whose_removal_is_killed_has_lost_its_name(tmp_path, die_after, killed):
    write_folder(tmp_path / "x", "text")
    with pytest.raises(killed), die_after(1):
        remove_folder(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    write_folder(tmp_path / "x", "text")
    assert names_in(tmp_path) == ["x"]


def test_removing_a_linked_folder_removes_only_the_link(tmp_path):
    write_folder(tmp_path / "x", "text")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    remove_folder(tmp_path / "link")
    assert names_in(tmp_path) == ["x"]
    assert names_in(tmp_path / "x") == ["one", "two"]
