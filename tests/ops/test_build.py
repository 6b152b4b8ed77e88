"""Building a library once: the cache, the lock, and what is said when it fails."""

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkv_train.assets import find_asset_folder
from rwkv_train.errors import BackendError
from rwkv_train.ops import build, cpp
from rwkv_train.ops.build import FLAGS, build_library, default_cache_folder, find_ninja, load_library
from rwkv_train.ops.cpp import load_cpp_library
from tests.campaigns.disk import SmallDisk, can_mount

needs_namespaces = pytest.mark.skipif(
    not can_mount(), reason="needs a machine that lets us mount (unshare, nsenter)"
)
PROGRAM = """
import sys
from pathlib import Path
from rwkv_train.errors import BackendError
from rwkv_train.ops.build import build_library
source, header, cache, compiler = map(Path, sys.argv[1:])
try:
    print(build_library("answer", source, [header], cache_folder=cache, compilers=[str(compiler)]))
except BackendError as error:
    print(error)
    sys.exit(2)
"""

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

    def slow_compiler(self, seconds: float) -> Path:
        """A compiler that takes its time, and says in a file that it has begun."""
        path = self.folder.parent / "slow-g++"
        begun = self.folder.parent / "begun"
        path.write_text(
            f'#!/bin/sh\ncase "$*" in *-dM*) ;; *) touch \'{begun}\'; sleep {seconds} ;; esac\nexec g++ "$@"\n'
        )
        path.chmod(0o755)
        return path

    def command(self, compiler="g++", cache=None) -> list[str]:
        """A process of its own that builds."""
        words = (sys.executable, "-c", PROGRAM, self.source, self.header, cache or self.cache, compiler)
        return [str(word) for word in words]

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


def test_a_compiler_that_cannot_be_started_is_named_with_the_fix(project, tmp_path):
    no_program = tmp_path / "no-program"
    no_program.write_bytes(bytes(100))
    no_program.chmod(0o755)
    with pytest.raises(BackendError, match=r"no-program cannot be started \(.*\); install it anew, or put"):
        project.build(compilers=(str(no_program),))


def test_a_compiler_that_does_not_answer_is_named_with_the_fix(project, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_ANSWER_SECONDS", 0.3)
    hangs = tmp_path / "hanging-compiler"
    hangs.write_text("#!/bin/sh\nexec sleep 30\n")
    hangs.chmod(0o755)
    with pytest.raises(BackendError, match=r"hanging-compiler did not answer within .*; install it anew"):
        project.build(compilers=(str(hangs),))


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


def cut(library, n_bytes):
    """Shorten a library. In a new file: this process may have mapped the old one, and would fall over it."""
    content = library.read_bytes()
    library.unlink()
    library.write_bytes(content[:n_bytes] if n_bytes else b"cut short")


@pytest.mark.parametrize("n_bytes", [0, 40, 4096, -1], ids=["no library", "header", "page", "last byte"])
def test_a_damaged_library_is_built_anew(tmp_path, caplog, n_bytes):
    cuda = find_asset_folder("cuda")
    headers = sorted((cuda / "common").glob("*.h"))
    library = build_library("wkv4_cpu", cuda / "wkv4" / "wkv4_cpu.cpp", headers, cache_folder=tmp_path)
    cut(library, n_bytes)
    caplog.clear()
    assert load_cpp_library("wkv4", tmp_path).rwkv_wkv4_forward
    assert caplog.text.count("building the kernel") == 1


@pytest.mark.parametrize("n_bytes", [40, 4096, -1])
def test_a_library_without_its_end_is_an_error_not_the_end_of_the_process(project, n_bytes):
    library = project.build()
    cut(library, n_bytes)
    with pytest.raises(OSError, match="is damaged: its end is missing"):
        load_library(library)


def test_a_damaged_library_that_cannot_be_built_anew_is_named_with_the_fix(tmp_path, monkeypatch):
    damaged = tmp_path / "wkv4_cpu.so"
    damaged.write_bytes(b"cut short")

    def build_nothing(*arguments, anew=False, **options):
        if anew:
            raise BackendError("no C++ compiler was found; install g++")
        return damaged

    monkeypatch.setattr(cpp, "build_library", build_nothing)
    with pytest.raises(
        BackendError, match=rf"{damaged} cannot be loaded .*, nor built anew: .*; install g\+\+"
    ):
        load_cpp_library("wkv4", tmp_path)


def start(command, **options):
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options)


def wait_for(path):
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.02)


def check_built_once(running):
    outputs = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    names = [Path(said.strip()) for said, _ in outputs]
    assert names[0].name == names[1].name
    assert sum(messages.count("building the kernel") for _, messages in outputs) == 1
    return names


def test_two_processes_at_once_build_it_once(project):
    names = check_built_once([start(project.command(project.slow_compiler(0.5))) for _ in range(2)])
    assert answer(names[0]) == 42


def test_after_a_builder_was_killed_the_next_one_works_at_once_and_clears_up(project, caplog):
    compiler = project.slow_compiler(30)
    killed = start(project.command(compiler), start_new_session=True)
    wait_for(project.folder.parent / "begun")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert {path.suffix for path in project.cache.iterdir()} == {".lock", ".tmp"}

    project.slow_compiler(0)
    began = time.monotonic()
    library = project.build(compilers=[str(compiler)])
    assert time.monotonic() - began < 15
    assert answer(library) == 42
    assert list(project.cache.iterdir()) == [library]
    assert "has ended; taking over" in caplog.text


def test_one_that_waits_takes_over_from_a_builder_that_is_killed(project):
    compiler = project.slow_compiler(30)
    killed = start(project.command(compiler), start_new_session=True)
    wait_for(project.folder.parent / "begun")
    waiting = start(project.command(compiler))
    time.sleep(0.5)
    project.slow_compiler(0)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    said, messages = waiting.communicate(timeout=30)
    assert waiting.returncode == 0, messages
    assert answer(said.strip()) == 42


def test_a_compiler_whose_builder_was_killed_and_that_goes_on_harms_nothing(project):
    compiler = project.slow_compiler(1.5)
    killed = start(project.command(compiler))
    wait_for(project.folder.parent / "begun")
    killed.kill()  # alone: ninja and the compiler do not notice
    killed.communicate()
    project.slow_compiler(0)
    library = project.build(compilers=[str(compiler)])
    made = library.stat().st_ino
    time.sleep(2)
    assert library.stat().st_ino == made
    assert answer(library) == 42


class Node:
    """Another computer, as far as a program can tell: a host name, process numbers and a mount of its own."""

    def __init__(self, name: str, project: Project) -> None:
        self.home = project.folder.parent / f"home of {name}"
        self.home.mkdir()
        project.cache.mkdir(exist_ok=True)
        become = 'hostname "$1" && mount --bind "$2" "$3" && shift 3 && exec "$@"'
        kinds = ("--map-root-user", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child")
        self.prefix = ["unshare", *kinds, "sh", "-c", become, "sh", name, str(project.cache), str(self.home)]

    def start(self, project: Project, compiler: Path) -> subprocess.Popen[str]:
        return start([*self.prefix, *project.command(compiler, self.home)], start_new_session=True)


@needs_namespaces
def test_two_nodes_with_one_cache_build_it_once(project):
    compiler = project.slow_compiler(1)
    nodes = [Node(f"node-{i}", project) for i in range(2)]
    names = check_built_once([node.start(project, compiler) for node in nodes])
    assert answer(project.cache / names[0].name) == 42


@needs_namespaces
def test_a_node_that_died_while_building_is_followed_by_another_one(project):
    compiler = project.slow_compiler(30)
    dead = Node("node-0", project).start(project, compiler)
    wait_for(project.folder.parent / "begun")
    os.killpg(dead.pid, signal.SIGKILL)
    dead.communicate()
    (lock,) = project.cache.glob("*.lock")
    long_ago = time.time() - 3600
    os.utime(lock, (long_ago, long_ago))

    project.slow_compiler(0)
    next_one = Node("node-1", project).start(project, compiler)
    said, messages = next_one.communicate(timeout=30)
    assert next_one.returncode == 0, messages
    assert "on node-0 was to make the kernel 'answer' and gave no sign of life" in messages
    assert answer(project.cache / Path(said.strip()).name) == 42


@needs_namespaces
@pytest.mark.parametrize("spare_bytes", [0, 8192], ids=["nothing", "a little"])
def test_a_full_disk_is_said_and_once_there_is_room_it_works(project, tmp_path, spare_bytes):
    with SmallDisk(tmp_path / "disk", megabytes=0.2) as disk:
        disk.fill(spare_bytes)
        command = [*disk.prefix, *project.command(cache=disk.folder / "cache")]
        full = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert full.returncode == 2, full
        assert "cannot be built because the disk of" in full.stdout
        assert "is full" in full.stdout
        assert "RWKV_TRAIN_KERNELS" in full.stdout
        disk.empty()
        again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert again.returncode == 0, again
        assert answer(disk.seen_from_here(Path(again.stdout.strip()))) == 42


def test_a_compiler_that_finds_the_disk_full_is_told_from_one_that_finds_a_mistake(project, tmp_path):
    compiler = tmp_path / "full-compiler"
    message = "/tmp/ccX.s: fatal error: error writing to /tmp/ccX.s: No space left on device"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-dM*) exit 0 ;; esac\necho "{message}"\nexit 1\n')
    compiler.chmod(0o755)
    with pytest.raises(BackendError, match=r"is full; free some space, or name other folders in .* TMPDIR"):
        project.build(compilers=[str(compiler)])


def test_a_compiler_that_hangs_is_not_waited_for_for_ever(project, monkeypatch, caplog):
    monkeypatch.setattr(build, "_REPORT_SECONDS", 0.3)
    monkeypatch.setattr(build, "LIMIT_SECONDS", 0.5)
    with pytest.raises(BackendError, match=r"building the kernel 'answer' took longer than"):
        project.build(compilers=[str(project.slow_compiler(30))])
    assert caplog.text.count("still building the kernel 'answer'") == 2
    assert list(project.cache.iterdir()) == []


def test_an_interrupted_build_is_no_mistake_of_the_source(project, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-dM*) exit 0 ;; esac\nkill -INT $PPID; sleep 1\n')
    compiler.chmod(0o755)
    with pytest.raises(BackendError, match="building the kernel 'answer' was interrupted; start it again"):
        project.build(compilers=[str(compiler)])
    assert list(project.cache.iterdir()) == []


def test_ninja_is_found_beside_the_interpreter_when_not_on_the_path(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert shutil.which("ninja") is None
    assert os.access(find_ninja(), os.X_OK)


def test_libraries_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("RWKV_TRAIN_KERNELS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / ".cache" / "rwkv-train" / "kernels"


def test_they_are_kept_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RWKV_TRAIN_KERNELS", "~/elsewhere")
    assert default_cache_folder() == tmp_path / "elsewhere"


def test_a_user_without_a_home_is_told_how_to_name_a_folder(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("RWKV_TRAIN_KERNELS", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(BackendError, match=r"there is no home folder .* name a folder in RWKV_TRAIN_KERNELS"):
        default_cache_folder()
