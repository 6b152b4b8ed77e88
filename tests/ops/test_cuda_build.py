"""Building CUDA kernels and finding built ones, with a compiler and a driver that only pretend, and with real nvcc."""

import runpy
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from rwkv_train.assets import find_asset_folder
from rwkv_train.errors import BackendError
from rwkv_train.ops import cuda_toolkit
from rwkv_train.ops.cuda_build import (
    ARCHITECTURES,
    Built,
    build_cuda_library,
    cuda_operators,
    find_source,
    load_cuda_library,
    runs_on,
)
from rwkv_train.ops.cuda_driver import Chip, Driver, ask_driver
from rwkv_train.ops.cuda_recurrence import chunked, declare
from rwkv_train.ops.cuda_toolkit import (
    Toolkit,
    check_architectures,
    explain_nvcc,
    find_toolkit,
    host_compiler,
    why_driver_refuses,
)
from tests.ops.chunked_kernels import CHUNKED_FORMS
from tests.ops.exact_kernels import FORMS, SIGNATURES


class Named:
    """A library that has every function it is asked for, as attributes from then on."""

    def __getattr__(self, name):
        setattr(self, name, SimpleNamespace())
        return getattr(self, name)


H100 = Chip("NVIDIA H100", "sm_90")
V100 = Chip("Tesla V100", "sm_70")
P100 = Chip("Tesla P100", "sm_60")
CHECK = find_asset_folder("cuda") / "check.py"

NVCC = """#!/bin/sh
case "$1" in
    --version) echo "Cuda compilation tools, release 13.0, V{version}"; exit ;;
    --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\nsm_120\\n'; exit ;;
esac
echo "$*" >> '{calls}'
{before}
shared= objects=
while [ $# -gt 0 ]; do
    case "$1" in
        --shared) shared=1 ;;
        -o) out=$2; shift ;;
        *.cu) source=$1 ;;
        *.o) objects="$objects $1" ;;
    esac
    shift
done
if [ "$shared" ]; then exec g++ -shared $objects -o "$out"; fi
exec g++ -x c++ -fPIC -c "$source" -o "$out"
"""
DRIVER = """
#include <cstring>
extern "C" {{
int cuInit(unsigned) {{ return {init}; }}
int cuDriverGetVersion(int* version) {{ *version = {version}; return 0; }}
int cuDeviceGetCount(int* count) {{ *count = {count}; return 0; }}
int cuDeviceGet(int* device, int ordinal) {{ *device = 10 + ordinal; return 0; }}
int cuDeviceGetName(char* name, int size, int device) {{
    std::strncpy(name, device == 10 ? "NVIDIA H100" : "NVIDIA B200", size);
    return 0;
}}
int cuDeviceGetAttribute(int* value, int attribute, int device) {{
    *value = attribute == 76 ? 0 : device == 10 ? 9 : 10;
    return 0;
}}
int cuGetErrorString(int error, const char** text) {{ *text = "system has driver mismatch"; return 0; }}
}}
"""


def driver_of(*chips, cuda=(13, 0)):
    return Driver(cuda, chips, None)


class Workshop:
    """A toolkit that only pretends, a folder of sources with one operator, and a cache."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        self.nvcc = folder / "toolkit" / "bin" / "nvcc"
        self.nvcc.parent.mkdir(parents=True)
        self.write_nvcc()
        self.sources, self.cache = folder / "sources", folder / "cache"
        self.source = self.sources / "toy" / "toy.cu"
        self.header = self.sources / "common" / "number.cuh"
        for path, text in (
            (self.source, '#include "../common/number.cuh"\nextern "C" int answer() { return kNumber; }\n'),
            (self.header, "constexpr int kNumber = 42;\n"),
        ):
            path.parent.mkdir(parents=True)
            path.write_text(text)
        monkeypatch.setenv("CUDA_HOME", str(self.nvcc.parent.parent))
        self.monkeypatch = monkeypatch

    def write_nvcc(self, version="13.0.88", before=":"):
        self.nvcc.write_text(NVCC.format(version=version, calls=self.calls, before=before))
        self.nvcc.chmod(0o755)
        cuda_toolkit._ask_nvcc.cache_clear()

    def fail_with(self, message):
        self.write_nvcc(before=f"cat <<'END'\n{message}\nEND\nexit 1")

    def remove_nvcc(self):
        """As on a node without a toolkit."""
        self.nvcc.unlink()
        self.monkeypatch.setenv("PATH", "/none")
        self.monkeypatch.setattr(cuda_toolkit, "USUAL_PLACE", Path("/none"))
        self.monkeypatch.setattr(cuda_toolkit, "_folders_of_packages", list)

    def n_builds(self):
        return self.calls.read_text().count("--shared") if self.calls.exists() else 0

    def build(self, *architectures, **options):
        places = {"cache_folder": self.cache, "source_folder": self.sources}
        return build_cuda_library("toy", architectures or None, **places, **options)

    def load(self, *chips, cuda=(13, 0)):
        driver = driver_of(*(chips or (H100,)), cuda=cuda)
        return load_cuda_library("toy", cache_folder=self.cache, source_folder=self.sources, driver=driver)


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    yield Workshop(tmp_path, monkeypatch)
    cuda_toolkit._ask_nvcc.cache_clear()


# --- building


def test_a_library_is_built_for_the_chips_that_are_there_and_can_be_called(workshop):
    library = workshop.build(driver=driver_of(H100, Chip("NVIDIA A100", "sm_80"), H100))
    assert workshop.load(H100).answer() == 42
    said = Built.parse(library.name)
    assert (said.op, said.nvcc, said.architectures) == ("toy", "13.0.88", ("sm_80", "sm_90"))
    compile_command = workshop.calls.read_text().splitlines()[0]
    assert "arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90" in compile_command


def test_several_sources_of_an_operator_become_one_library(workshop):
    workshop.source.with_name("second.cu").write_text('extern "C" int second() { return 7; }\n')
    workshop.build("sm_90")
    library = workshop.load()
    assert (library.answer(), library.second()) == (42, 7)


def test_what_is_there_is_not_built_again(workshop):
    assert workshop.build("sm_90") == workshop.build("sm_90")
    workshop.load()
    assert workshop.n_builds() == 1


def test_a_changed_source_header_compiler_or_architecture_builds_another_library(workshop):
    names = [workshop.build("sm_90"), workshop.build("sm_80")]
    workshop.source.write_text(workshop.source.read_text() + "// changed\n")
    names.append(workshop.build("sm_90"))
    workshop.header.write_text("constexpr int kNumber = 43;\n")
    names.append(workshop.build("sm_90"))
    assert workshop.load().answer() == 43
    workshop.write_nvcc("13.1.1")
    names.append(workshop.build("sm_90"))
    assert len(set(names)) == 5


def test_the_order_of_architectures_does_not_matter(workshop):
    first = workshop.build("compute_80", "sm_90", "sm_80")
    assert workshop.build("sm_80", "sm_90", "compute_80") == first
    assert Built.parse(first.name).architectures == ("sm_80", "sm_90", "compute_80")


@pytest.mark.parametrize(
    ("architecture", "sentence"),
    [
        ("sm_60", r"sm_60 is too old: the kernels need sm_70 \(Volta\) or later.* backend 'torch'"),
        (
            "sm_70",
            r"does not compile for sm_70: CUDA 13 dropped it \(Volta\); install the toolkit of CUDA 12",
        ),
        (
            "sm_100",
            r"does not compile for sm_100: it knows sm_75, sm_80, sm_90, sm_120; install a CUDA toolkit",
        ),
        ("sm_200", r"nvcc 13\.0\.88 \(.*\) does not compile for sm_200"),
        ("compute_100", "does not compile for compute_100"),
        ("hopper", "'hopper' is no architecture; one is written as in 'sm_90'"),
        ("sm_9", "'sm_9' is no architecture"),
    ],
)
def test_what_cannot_be_compiled_for_is_refused_by_name(workshop, architecture, sentence):
    with pytest.raises(BackendError, match=sentence):
        workshop.build("sm_90", architecture)


@pytest.mark.parametrize(
    ("version", "architecture", "sentence"),
    [
        ("12.4.131", "sm_120", r"it needs CUDA 12\.8 or later; install that and set CUDA_HOME"),
        ("12.8.61", "sm_103", r"it needs CUDA 12\.9 or later"),
        ("14.0.1", "sm_75", r"it has been given up there; install an older CUDA toolkit"),
    ],
)
def test_a_compiler_too_old_or_too_new_for_a_chip_is_told_apart(version, architecture, sentence):
    toolkit = Toolkit(Path("nvcc"), version, frozenset({"sm_80", "sm_90"}))
    with pytest.raises(BackendError, match=sentence):
        check_architectures(toolkit, ["sm_90", architecture])


def test_without_a_chip_and_without_a_name_it_says_how_to_name_one(workshop):
    no_driver = Driver(None, (), "there is no NVIDIA driver here")
    with pytest.raises(
        BackendError, match=r"no NVIDIA driver here; to build .* \('rwkv-train build-kernels --arch sm_90'\)"
    ):
        workshop.build(driver=no_driver)


def test_an_operator_without_cuda_sources_is_named(workshop):
    with pytest.raises(BackendError, match="the operator 'wkv99' has no CUDA backend"):
        build_cuda_library("wkv99", ["sm_90"], source_folder=workshop.sources)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (
            "host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions later than 13 are not "
            "supported!",
            r"takes g\+\+ up to version 13; install g\+\+-13 and name it in NVCC_CCBIN",
        ),
        ("nvcc fatal : Failed to preprocess host compiler properties.", r"install g\+\+"),
        ("toy.cu:1:10: fatal error: cuda_runtime.h: No such file or directory", "toolkit lacks its runtime"),
        ("/usr/bin/ld: cannot find -lcudart_static: No such file", "toolkit lacks its runtime"),
        ("toy.ptx, line 9; fatal : Unsupported .version 9.5; current version is '9.0'", "all of one version"),
        ("nvlink fatal : write error: No space left on device", "disk of .* is full; free some space"),
    ],
    ids=["refused host compiler", "no host compiler", "no header", "mixed", "no runtime", "full disk"],
)
def test_known_failures_of_nvcc_say_what_to_do(workshop, message, sentence):
    workshop.fail_with(message)
    with pytest.raises(BackendError, match=sentence):
        workshop.build("sm_90")
    assert not list(workshop.cache.glob("*.so"))


def test_a_broken_host_compiler_keeps_its_own_words_and_a_log(workshop):
    """The two lines that nvcc 13.0 gives for one."""
    workshop.fail_with(
        "g++: fatal error: cannot execute 'cc1plus'\nnvcc fatal   : Failed to preprocess host compiler properties."
    )
    with pytest.raises(BackendError) as raised:
        workshop.build("sm_90")
    (log,) = workshop.cache.glob("*.log")
    assert (
        f"cannot be built (g++: fatal error: cannot execute 'cc1plus'; the whole output is in {log}): "
        in str(raised.value)
    )
    assert str(raised.value).endswith("or name another one in NVCC_CCBIN")
    assert "Failed to preprocess" in log.read_text()


def test_the_words_host_compiler_in_a_source_are_no_failure_of_it():
    assert explain_nvcc("/host compiler/toy.cu(3): error: expected a ';' of the host compiler") is None


def test_any_other_failure_of_nvcc_is_its_own_sentence_and_a_log(workshop):
    workshop.fail_with('toy.cu(3): error: identifier "x" is undefined')
    with pytest.raises(BackendError, match=r"'toy_cuda' does not compile with .*nvcc: .* is undefined"):
        workshop.build("sm_90")
    (log,) = workshop.cache.glob("*.log")
    assert "is undefined" in log.read_text()


def test_ordinary_output_of_nvcc_is_no_known_failure():
    assert explain_nvcc("toy.cu(3): error: expected a ';'") is None


# --- finding the compiler


def test_nvcc_is_looked_for_in_the_usual_places_in_order(workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_toolkit, "USUAL_PLACE", tmp_path / "usual")
    monkeypatch.setattr(cuda_toolkit, "_folders_of_packages", lambda: [str(tmp_path / "package")])
    for folder in ("path", "usual/bin", "package", "second/bin"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(workshop.nvcc, tmp_path / folder / "nvcc")
    environment = {
        "CUDA_HOME": str(workshop.nvcc.parent.parent),
        "CUDA_PATH": str(tmp_path / "second"),
        "PATH": str(tmp_path / "path"),
    }
    found = []
    for gone in ("CUDA_HOME", "CUDA_PATH", "PATH", None):
        found.append(find_toolkit(environment).nvcc.parent)
        environment.pop(gone, None)
    shutil.rmtree(tmp_path / "usual")
    found.append(find_toolkit(environment).nvcc.parent)
    places = (workshop.nvcc.parent, "second/bin", "path", "usual/bin", "package")
    assert found == [tmp_path / place for place in places]


def test_a_missing_nvcc_names_where_it_was_looked_for_and_what_to_do(workshop, monkeypatch):
    workshop.remove_nvcc()
    with pytest.raises(BackendError) as raised:
        workshop.build("sm_90")
    for part in (
        "nvcc",
        f"CUDA_HOME={workshop.nvcc.parent.parent}",
        "PATH",
        "set CUDA_HOME",
        "build-kernels",
    ):
        assert part in str(raised.value)


def test_an_nvcc_too_old_for_the_sources_is_refused(workshop):
    workshop.write_nvcc("11.2.152")
    with pytest.raises(BackendError, match=r"nvcc 11\.2\.152 .* is too old: the kernels need CUDA 11\.8"):
        workshop.build("sm_90")


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo 'libstdc++.so.6: cannot open shared object file' >&2; exit 127", r"does not work \(libstdc"),
        ("printf 'kein L\\366schen' >&2; exit 1", r"does not work \(kein L\ufffdschen\)"),  # Latin-1
        ("echo hello", "does not say its version"),
    ],
)
def test_an_nvcc_that_does_not_work_is_named(workshop, script, sentence):
    workshop.nvcc.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(BackendError, match=sentence):
        workshop.build("sm_90")


def test_a_folder_for_temporary_files_that_is_none_is_named_not_the_compiler(workshop, monkeypatch, tmp_path):
    """What nvcc 13.0 says then; its --version works."""
    say = "echo \"nvcc fatal   : Could not open output file '$TMPDIR/tmpxft_1'\"; exit 1"
    named = rf"TMPDIR={tmp_path}/none, .* is no folder; name another one, or unset it"
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    workshop.write_nvcc(before=say)
    with pytest.raises(BackendError, match=rf"'toy_cuda' cannot be built \(nvcc fatal .*\): {named}"):
        workshop.build("sm_90")
    workshop.nvcc.write_text(
        workshop.nvcc.read_text().replace("--list-gpu-code)", f"--list-gpu-code) {say};")
    )
    cuda_toolkit._ask_nvcc.cache_clear()
    with pytest.raises(BackendError, match=rf"nvcc fails \(nvcc fatal .*\): {named}"):
        workshop.build("sm_90")


def test_the_host_compiler_is_the_one_that_is_named_else_the_first_one_on_the_path(tmp_path):
    for name in ("clang++", "mine"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    path = {"PATH": str(tmp_path)}
    assert host_compiler(path) == str(tmp_path / "clang++")
    assert host_compiler(path | {"NVCC_CCBIN": str(tmp_path / "mine")}) == str(tmp_path / "mine")
    with pytest.raises(BackendError, match="NVCC_CCBIN=none-such: there is no such compiler"):
        host_compiler(path | {"NVCC_CCBIN": "none-such"})
    with pytest.raises(
        BackendError, match=r"nvcc needs a C\+\+ compiler and none was found .* install g\+\+"
    ):
        host_compiler({"PATH": "/none"})


# --- finding a library


def test_what_was_built_elsewhere_runs_where_there_is_no_compiler(workshop):
    workshop.build("sm_80", "sm_90")
    workshop.remove_nvcc()
    assert workshop.load(H100).answer() == 42


def test_what_came_with_the_wheel_is_taken_first(workshop):
    prebuilt = build_cuda_library(
        "toy",
        ["sm_80", "compute_80"],
        cache_folder=workshop.sources / "prebuilt",
        source_folder=workshop.sources,
    )
    assert workshop.load(H100)._name == str(prebuilt)
    assert not workshop.cache.exists()


def test_what_came_with_the_wheel_and_does_not_fit_is_passed_over(workshop):
    build_cuda_library(
        "toy", ["sm_80"], cache_folder=workshop.sources / "prebuilt", source_folder=workshop.sources
    )
    library = workshop.load(H100)
    assert Path(library._name).parent == workshop.cache


def test_without_a_compiler_and_with_nothing_that_fits_it_says_why(workshop):
    library = workshop.build("sm_80")
    workshop.remove_nvcc()
    with pytest.raises(BackendError) as raised:
        workshop.load(H100)
    assert "nvcc, the CUDA compiler, was not found" in str(raised.value)
    assert f"passed over: {library}: it holds sm_80, nothing for sm_90 (NVIDIA H100)" in str(raised.value)


def test_what_was_built_from_other_sources_is_never_loaded(workshop):
    workshop.build("sm_90")
    workshop.remove_nvcc()
    workshop.header.write_text("constexpr int kNumber = 43;\n")
    with pytest.raises(BackendError, match="built from other sources"):
        workshop.load()


def test_a_damaged_library_is_built_anew(workshop, caplog):
    library = workshop.build("sm_90")
    library.write_bytes(b"cut short")
    assert workshop.load().answer() == 42
    assert "is passed over: it cannot be loaded" in caplog.text
    assert workshop.n_builds() == 2


def test_a_library_without_its_end_is_built_anew_once(workshop, caplog):
    library = workshop.build("sm_90")
    library.write_bytes(library.read_bytes()[:4096])
    assert workshop.load().answer() == 42
    assert "is passed over: it cannot be loaded" in caplog.text
    assert workshop.n_builds() == 2


def test_a_library_without_its_end_is_refused_where_nothing_can_be_built(workshop):
    library = workshop.build("sm_90")
    library.write_bytes(library.read_bytes()[:4096])
    workshop.remove_nvcc()
    with pytest.raises(BackendError, match=f"install .*passed over: {library}: .* is damaged"):
        workshop.load()


def test_a_driver_too_old_for_the_compiler_is_said_before_anything_is_built(workshop):
    with pytest.raises(BackendError) as raised:
        workshop.load(cuda=(12, 4))
    assert "CUDA 13.0 needs a driver of CUDA 13 (580 or later), and the one here is of CUDA 12.4" in str(
        raised.value
    )
    assert "update the driver, or install the toolkit of CUDA 12" in str(raised.value)
    assert workshop.n_builds() == 0


def test_building_for_this_machine_is_refused_too_if_its_driver_is_too_old(workshop):
    with pytest.raises(BackendError, match=r"does not run here: CUDA 13\.0 needs a driver of CUDA 13"):
        workshop.build(driver=driver_of(H100, cuda=(12, 4)))
    assert workshop.build("sm_90", driver=driver_of(H100, cuda=(12, 4))).is_file()  # for another machine


def test_a_driver_too_old_for_one_library_takes_another_one(workshop):
    workshop.build("sm_90")
    workshop.write_nvcc("12.8.93")
    older = workshop.build("sm_90")
    workshop.remove_nvcc()
    assert workshop.load(cuda=(12, 4))._name == str(older)


def test_a_compiler_that_does_not_know_the_chip_gives_way_to_what_another_one_built(workshop):
    workshop.build("sm_90")
    workshop.write_nvcc("12.0.1")
    workshop.nvcc.write_text(workshop.nvcc.read_text().replace("sm_90", "sm_87"))
    assert workshop.load(H100).answer() == 42


def test_chips_too_old_for_the_kernels_are_refused_unless_there_is_a_newer_one(workshop):
    with pytest.raises(BackendError, match=r"Tesla P100 \(sm_60\): too old, the kernels need sm_70"):
        workshop.load(P100)
    assert workshop.load(P100, H100).answer() == 42


def test_volta_is_built_for_where_the_compiler_still_knows_it(workshop):
    with pytest.raises(BackendError, match=r"does not compile for sm_70: CUDA 13 dropped it"):
        workshop.load(V100)
    workshop.write_nvcc("12.8.93")
    workshop.nvcc.write_text(workshop.nvcc.read_text().replace("'sm_75", "'sm_70\\nsm_75"))
    library = workshop.load(V100, V100)
    assert library.answer() == 42
    assert Built.parse(Path(library._name).name).architectures == ("sm_70",)


def test_volta_beside_a_newer_chip_does_not_keep_that_from_its_kernels(workshop):
    library = workshop.load(V100, H100)
    assert Built.parse(Path(library._name).name).architectures == ("sm_90",)


@pytest.mark.parametrize(
    ("chip", "holds", "runs"),
    [
        ("sm_90", ["sm_90"], True),
        ("sm_86", ["sm_80"], True),
        ("sm_80", ["sm_86"], False),
        ("sm_90", ["sm_89"], False),
        ("sm_103", ["sm_100"], True),
        ("sm_110", ["sm_100"], False),
        ("sm_110", ["sm_100", "compute_80"], True),
        ("sm_110", ["sm_75", "compute_75"], False),  # kernels on tensor cores would stop
        ("sm_75", ["compute_70"], True),
        ("sm_75", ["sm_80", "compute_80"], False),
        *((chip, ARCHITECTURES, True) for chip in ("sm_75", "sm_87", "sm_89", "sm_103", "sm_121", "sm_130")),
    ],
)
def test_which_chips_a_library_runs_on(chip, holds, runs):
    """NVIDIA's rules of binary compatibility: within a family upwards; PTX on all that is later, less one of ours."""
    assert runs_on(chip, holds) is runs


@pytest.mark.parametrize(
    ("cuda", "driver", "needs_ptx", "refuses"),
    [
        ((13, 0), (13, 0), True, False),
        ((12, 8), (13, 0), True, False),
        ((13, 0), (12, 9), False, True),
        ((12, 8), (12, 2), False, False),  # within a major version any minor one runs
        ((12, 8), (12, 2), True, True),  # but does not compile a newer one's PTX
    ],
)
def test_which_drivers_run_what_a_cuda_compiled(cuda, driver, needs_ptx, refuses):
    """NVIDIA's rules of minor version compatibility."""
    assert (why_driver_refuses(cuda, driver, needs_ptx=needs_ptx) is not None) is refuses


def test_a_name_says_what_was_written_into_it():
    built = Built("wkv7", "0123abcd", "x86_64", "13.0.88", ("sm_80", "sm_90", "compute_80"))
    assert Built.parse(built.file_name) == built
    assert Built.parse("wkv7_cpu-0123abcd.so") is None


# --- the driver


@pytest.fixture(scope="module")
def make_driver(tmp_path_factory):
    def make(init=0, version=12040, count=2):
        folder = tmp_path_factory.mktemp("driver")
        (folder / "driver.cpp").write_text(DRIVER.format(init=init, version=version, count=count))
        library = folder / "libcuda.so.1"
        subprocess.run(["g++", "-shared", "-fPIC", folder / "driver.cpp", "-o", library], check=True)
        return str(library)

    return make


def test_the_driver_is_asked_for_its_version_and_chips(make_driver):
    said = ask_driver(make_driver())
    assert said == Driver((12, 4), (Chip("NVIDIA H100", "sm_90"), Chip("NVIDIA B200", "sm_100")), None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"count": 0}, "shows no chip; see nvidia-smi, and CUDA_VISIBLE_DEVICES"),
        ({"init": 100}, "shows no chip"),
        ({"init": 803}, r"does not start \(system has driver mismatch\)"),
    ],
)
def test_a_driver_without_chips_says_why(make_driver, options, sentence):
    said = ask_driver(make_driver(**options))
    assert (said.cuda, said.chips) == ((12, 4), ())
    with pytest.raises(BackendError, match=sentence):
        load_cuda_library("wkv7", driver=said)


def test_no_driver_is_said():
    said = ask_driver("libno-such-driver.so.1")
    assert (said.cuda, said.chips) == (None, ())
    assert "there is no NVIDIA driver here" in said.problem


# --- what is there


def test_every_operator_has_a_cuda_source_that_is_found():
    assert set(cuda_operators()) >= {"wkv4", "wkv5", "wkv6", "wkv7"}
    source = find_source("wkv7")
    assert {"wkv7.cu", "wkv7_chunked_forward.cu"} <= {unit.name for unit in source.units}
    assert "gpu.cuh" in {header.name for header in source.headers}


def test_the_table_of_the_check_reads_the_assembler():
    """A message of nvcc 13.0, shortened; the names as c++filt gives them."""
    check = runpy.run_path(str(CHECK))
    output = (
        "ptxas info    : 0 bytes gmem\n"
        "ptxas info    : Compiling entry function '_ZN12_GLOBAL__N_115backward_kernelILi64EEEvPfi' for 'sm_90'\n"
        "ptxas info    : Function properties for _ZN12_GLOBAL__N_115backward_kernelILi64EEEvPfi\n"
        "    56 bytes stack frame, 56 bytes spill stores, 104 bytes spill loads\n"
        "ptxas info    : Used 128 registers, used 1 barriers, 56 bytes cumulative stack size, 1024 bytes smem\n"
        "ptxas info    : Compile time = 1634.994 ms\n"
        "ptxas info    : Compiling entry function '_Z3addPfi' for 'sm_90'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 8 registers, used 0 barriers\n"
    )
    kernels = list(check["read_kernels"](output))
    assert [tuple(kernel) for kernel in kernels] == [
        ("add", 8, 0, 0),
        ("backward_kernel<64>", 128, 1024, 160),
    ]
    result = check["Result"](CHECK, "sm_90", 1.0, None, tuple(kernels))
    (problem,) = check["problems_of"]([result])
    assert "backward_kernel<64> spills 160 bytes" in problem
    name = "void (anonymous namespace)::kernel<(int)64, (bool)1, -(int)1>(float const*, int)"
    assert check["short_name"](name) == "kernel<64, 1, -1>"


def test_the_check_lets_kernels_spill_on_chips_that_never_run_them():
    check = runpy.run_path(str(CHECK))
    spills = (check["Kernel"]("kernel", 255, 0, 8),)
    problems = check["problems_of"](
        check["Result"](Path(f"wkv7/{unit}.cu"), architecture, 1.0, None, spills)
        for unit in ("wkv7", "wkv7_chunked_forward")
        for architecture in ("sm_75", "sm_80", "compute_80")
    )
    assert len(problems) == 5
    assert not any("wkv7_chunked_forward.cu for sm_75" in problem for problem in problems)


@pytest.mark.parametrize("op", list(SIGNATURES))
def test_the_check_looks_for_every_function_that_python_calls(op):
    signatures = [
        *(SIGNATURES[op]._replace(form=form) for name, form in FORMS if name == op),
        *(chunked(SIGNATURES[op], form) for name, form in CHUNKED_FORMS if name == op),
    ]
    called = Named()
    for signature in signatures:
        declare(called, signature)
    assert set(runpy.run_path(str(CHECK))["functions_of"](op)) == set(vars(called))


def real_toolkit():
    try:
        return find_toolkit()
    except BackendError:
        return None


@pytest.mark.skipif(real_toolkit() is None, reason="needs nvcc")
def test_real_nvcc_makes_a_library_that_needs_no_cuda_to_be_loaded(workshop, monkeypatch):
    monkeypatch.delenv("CUDA_HOME")
    workshop.source.write_text(
        "#include <cuda_runtime.h>\n"
        "__global__ void add(float* x) { x[threadIdx.x] += 1.0f; }\n"
        'extern "C" __attribute__((visibility("default"))) int answer() {\n'
        "    add<<<1, 1>>>(nullptr);\n"
        "    return cudaGetLastError();\n"
        "}\n"
    )
    library = workshop.build("sm_90")
    needed = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in needed
    no_driver_too_old_or_no_device = {35, 100}
    if shutil.which("nvidia-smi") is None:
        assert workshop.load(H100).answer() in no_driver_too_old_or_no_device
