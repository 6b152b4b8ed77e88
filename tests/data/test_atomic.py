"""Files that appear together: nothing of a failed attempt is left, nothing good is lost."""

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

from rwkv_train.data.atomic import AtomicFiles
from rwkv_train.errors import DataError


@contextmanager
def largest_file(n_bytes: int):
    """Let the system refuse longer files: what a full disk looks like to a program, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write(paths, contents, **options) -> None:
    with AtomicFiles(paths, **options) as files:
        for path, content in zip(paths, contents, strict=True):
            files[path].write(content)


@pytest.fixture
def paths(tmp_path):
    folder = tmp_path / "new folder"
    return [folder / "data", folder / "index"]


def names(paths) -> list[str]:
    return sorted(path.name for path in paths[0].parent.iterdir())


def test_the_files_appear_when_all_are_complete(paths):
    with AtomicFiles(paths) as files:
        files[paths[0]].write(b"one")
        assert not any(path.exists() for path in paths)
        files[paths[1]].write(b"two")

    assert [path.read_bytes() for path in paths] == [b"one", b"two"]
    assert names(paths) == ["data", "index"]


def test_an_error_leaves_nothing(paths):
    with pytest.raises(ZeroDivisionError), AtomicFiles(paths) as files:
        files[paths[0]].write(b"x" * (1 // 0))

    assert names(paths) == []


def test_a_full_disk_is_one_sentence_and_leaves_the_old_files(paths):
    write(paths, [b"old", b"old"])

    with largest_file(100_000), pytest.raises(DataError, match=r"cannot write .*index: File too large"):
        write(paths, [b"x" * 1_000_000, b""], overwrite=True)

    assert names(paths) == ["data", "index"]
    assert paths[0].read_bytes() == b"old"


def test_a_disk_that_is_full_only_at_the_last_buffer_is_noticed(paths):
    with largest_file(1_000), pytest.raises(DataError, match=r"cannot write .*index: File too large"):
        write(paths, [b"x" * 1_001, b""])  # shorter than a buffer: written when the file is closed

    assert names(paths) == []


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(DataError, match=r"cannot write .*out: (File exists|Not a directory)"):
        write([tmp_path / "file" / "out"], [b""])


def test_a_read_only_folder_is_one_sentence(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    try:
        (folder / "probe").touch()
    except PermissionError:
        pass
    else:
        pytest.skip("needs a user whom permissions bind; this one is root")

    with pytest.raises(DataError, match=r"cannot write .*out: Permission denied"):
        write([folder / "out"], [b""])


def test_an_existing_file_is_replaced_only_when_asked(paths):
    write(paths, [b"old", b"old"])

    with pytest.raises(DataError, match=r"data exists already; choose another output or ask for overwriting"):
        write(paths, [b"new", b"new"])
    assert paths[0].read_bytes() == b"old"

    write(paths, [b"new", b"new"], overwrite=True)
    assert [path.read_bytes() for path in paths] == [b"new", b"new"]


def test_a_file_that_another_process_made_meanwhile_is_kept(paths):
    with pytest.raises(DataError, match="index exists already"), AtomicFiles(paths):
        paths[1].write_bytes(b"theirs")

    assert names(paths) == ["index"]
    assert paths[1].read_bytes() == b"theirs"


def test_the_mark_of_a_complete_set_is_gone_while_files_are_replaced(paths, monkeypatch):
    write(paths, [b"old", b"old"])
    seen = []
    replace = Path.replace

    def spy(source, target):
        seen.append(paths[1].exists())
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", spy)
    write(paths, [b"new", b"new"], overwrite=True)

    assert seen == [False, False]


def test_a_signal_while_the_files_are_opened_leaves_nothing(tmp_path, monkeypatch):
    opened = []
    original = Path.open

    def interrupt_the_second(self, *arguments):
        opened.append(self)
        file = original(self, *arguments)
        if len(opened) == 2:
            file.close()
            raise KeyboardInterrupt
        return file

    monkeypatch.setattr(Path, "open", interrupt_the_second)
    with pytest.raises(KeyboardInterrupt), AtomicFiles([tmp_path / "a", tmp_path / "b"]):
        pass
    assert len(opened) == 2
    assert list(tmp_path.iterdir()) == []
