"""Building a library once: the cache, the lock, and what is said when it fails."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_train.assets import find_asset_folder
from rwkv_train.errors import BackendError
from rwkv_train.ops.build import FLAGS, build_library, default_cache_folder, find_ninja
from rwkv_train.ops.cpp import load_cpp_library

SOURCE = '#include "number.h"\nextern "C" __attribute__((visibility("default"))) int answer() { return kNumber; }\n'


class Project:
    """A source and a header in a folder whose name is hard to write in a build file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a folder: with $ and 'quotes'"
        self.folder.mkdir()
        self.cache = folder / "cache of kernels"
        self.source, self.header = self.folder / "answer.cpp", self.folder / "number.h"
        self.source.write_text(SOURCE)
        self.header.write_text("constexpr int kNumber = 42;\n")

    def build(self, **options) -> Path:
        options = {"cache_folder": self.cache, **options}
        return build_library("answer", self.source, [self.header], **options)


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def answer(library):
    return ctypes.CDLL(str(library)).answer()


def test_a_library_is_built_and_can_be_called(project):
    assert answer(project.build()) == 42


def test_building_says_what_it_does_and_leaves_no_other_files(project, caplog):
    with caplog.at_level(logging.WARNING):
        library = project.build()
    assert "building the kernel 'answer' for this machine" in caplog.text
    assert {path.suffix for path in project.cache.iterdir()} <= {".so", ".lock"}
    assert library.parent == project.cache


def test_a_library_that_is_there_is_not_built_again(project, caplog):
    library = project.build()
    built_at = library.stat().st_mtime_ns
    caplog.clear()
    assert project.build() == library
    assert library.stat().st_mtime_ns == built_at
    assert "building" not in caplog.text


def test_a_changed_source_header_or_flag_builds_another_library(project):
    names = {project.build()}
    names.add(project.build(flags=(*FLAGS, "-DUNUSED")))
    project.header.write_text("constexpr int kNumber = 43;\n")
    names.add(changed := project.build())
    project.source.write_text(SOURCE + "// changed\n")
    names.add(project.build())
    assert len(names) == 4
    assert answer(changed) == 43


def test_a_missing_compiler_is_named_with_the_fix(project):
    with pytest.raises(
        BackendError, match=r"no C\+\+ compiler was found \(looked for none-such\); install g\+\+"
    ):
        project.build(compilers=("none-such",))


def test_a_compiler_that_does_not_work_is_named(project, tmp_path):
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho 'fatal error: no licence' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(BackendError, match=r"broken-compiler does not work: fatal error: no licence"):
        project.build(compilers=(str(broken),))


def test_a_source_that_does_not_compile_is_one_sentence_and_a_log(project):
    project.header.write_text("constexpr int kNumber = no_such_name;\n")
    with pytest.raises(
        BackendError, match=r"'answer' does not compile with .*error: .*no_such_name"
    ) as raised:
        project.build()
    (log,) = project.cache.glob("*.log")
    assert str(log) in str(raised.value)
    assert "no_such_name" in log.read_text()
    assert not list(project.cache.glob("*.so"))


def test_after_a_failed_build_the_next_one_works(project):
    project.header.write_text("#error not yet\n")
    with pytest.raises(BackendError):
        project.build()
    project.header.write_text("constexpr int kNumber = 7;\n")
    assert answer(project.build()) == 7


def test_a_cache_folder_that_cannot_be_written_is_named(project):
    in_a_file = project.source / "cache"  # fails for every user, root too
    with pytest.raises(BackendError, match=r"the folder .*answer\.cpp/cache cannot be written"):
        project.build(cache_folder=in_a_file)


def test_a_library_that_cannot_be_loaded_is_named_with_the_fix(tmp_path):
    cuda = find_asset_folder("cuda")
    headers = sorted((cuda / "common").glob("*.h"))
    library = build_library("wkv4_cpu", cuda / "wkv4" / "wkv4_cpu.cpp", headers, cache_folder=tmp_path)
    library.write_bytes(b"cut short")
    with pytest.raises(BackendError, match=f"{library} cannot be loaded .*delete it to build it anew"):
        load_cpp_library("wkv4", tmp_path)


def test_two_processes_at_once_build_it_once(project):
    program = (
        "import sys; from pathlib import Path; from rwkv_train.ops.build import build_library\n"
        "source, header, cache = map(Path, sys.argv[1:])\n"
        "print(build_library('answer', source, [header], cache_folder=cache))"
    )
    command = [sys.executable, "-c", program, project.source, project.header, project.cache]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in running]

    assert [process.returncode for process in running] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert answer(outputs[0][0].strip()) == 42
    assert sum(messages.count("building the kernel") for _, messages in outputs) == 1


def test_ninja_is_found_beside_the_interpreter_when_not_on_the_path(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert shutil.which("ninja") is None
    assert os.access(find_ninja(), os.X_OK)


def test_libraries_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / ".cache" / "rwkv-train" / "kernels"
