"""What the doctor finds on made-up machines: scripts for programs, packages that break, hand-written trials."""

import shutil
import signal
import sys
import tomllib
from pathlib import Path

import pytest

from rwkv_train.errors import BackendError
from rwkv_train.ops.cuda_driver import Chip, Driver, ask_driver
from rwkv_train.ops.cuda_toolkit import find_toolkit, host_compiler
from rwkv_train.planning.doctor.backends import judge_backends
from rwkv_train.planning.doctor.examine import judge
from rwkv_train.planning.doctor.machine import find_cache_folder, find_memory, find_processor
from rwkv_train.planning.doctor.nvidia import Smi, ask_smi, count_chips_on_bus, judge_chips, judge_driver
from rwkv_train.planning.doctor.packages import EXTRAS, find_extras, find_requirements, read_requirements
from rwkv_train.planning.doctor.probe import probe
from rwkv_train.planning.doctor.toolchain import find_compiler, find_cuda_compiler, find_ninja_program

CHECKOUT = Path(__file__).parents[2]
GIB = 2**30

NO_DRIVER = Driver(None, (), "there is no NVIDIA driver here (libcuda.so.1 was not found); install one")
NO_SMI = Smi(None, (), None)
TORCH = {
    "version": "2.13.0",
    "cuda": "13.0",
    "threads": 8,
    "cuda_devices": 1,
    "architectures": ["sm_80", "sm_90"],
    "devices": [{"name": "NVIDIA H100", "capability": "9.0", "memory_bytes": 80 * GIB}],
    "cuda_problem": None,
}
OPS = ("wkv4", "wkv5", "wkv6", "wkv7")


def write_program(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    path.chmod(0o755)
    return str(path)


def must_have_remedy(findings):
    for finding in findings:
        assert finding.remedy or finding.status in ("ok", "absent"), finding


# ---- the machine


def test_a_processor_is_named_with_the_cores_that_a_container_leaves(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC 9654\n\nprocessor\t: 1\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    found = find_processor(tmp_path / "cpuinfo", tmp_path / "cpu.max", n_cores=96)
    assert found.found == "AMD EPYC 9654, 96 cores for this process, held to the time of 1.5 by its container"
    assert found.facts == {"name": "AMD EPYC 9654", "cores": 96, "container_cores": 1.5}


@pytest.mark.parametrize(
    ("available_kb", "limit", "status"),
    [
        (50_000_000, None, "ok"),
        (50_000_000, "max", "ok"),
        (1_000_000, None, "warning"),
        (50_000_000, "1073741824", "warning"),
    ],
    ids=["plenty", "no limit", "used up", "small container"],
)
def test_too_little_memory_is_noticed(tmp_path, available_kb, limit, status):
    (tmp_path / "meminfo").write_text(f"MemTotal: 64000000 kB\nMemAvailable: {available_kb} kB\n")
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit + "\n")
    found = find_memory(tmp_path / "meminfo", tmp_path / "memory.max")
    assert found.status == status
    assert found.facts["total_bytes"] == 64_000_000 * 1024
    must_have_remedy([found])


def test_a_system_that_says_nothing_of_itself_is_no_problem(tmp_path):
    assert find_memory(tmp_path / "no", tmp_path / "no").status == "ok"
    assert find_processor(tmp_path / "no", tmp_path / "no", n_cores=1).facts["cores"] == 1


def test_a_folder_for_kernels_is_made_and_left_empty(tmp_path):
    folder = tmp_path / "new" / "kernels"
    found = find_cache_folder(lambda: folder)
    assert found.status == "ok"
    assert found.facts["is_writable"]
    assert found.facts["free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert list(folder.iterdir()) == []


def no_home():
    raise BackendError(
        "there is no home folder to keep built kernels in; name a folder in RWKV_TRAIN_KERNELS"
    )


def test_a_folder_for_kernels_that_cannot_be_had_comes_with_the_way_out(tmp_path):
    (tmp_path / "file").write_text("")
    for where in (lambda: tmp_path / "file" / "kernels", no_home):
        found = find_cache_folder(where)
        assert found.status == "warning"
        assert "RWKV_TRAIN_KERNELS" in found.remedy
        assert not found.facts["is_writable"]


# ---- the driver and its chips


def test_the_driver_and_all_chips_are_read_from_nvidia_smi(tmp_path):
    line = "echo '570.86.15, NVIDIA A100-SXM4-80GB, 81920, 8.0'"
    smi = ask_smi(write_program(tmp_path / "nvidia-smi", line, line))
    assert smi.driver_version == "570.86.15"
    assert [chip.memory_bytes for chip in smi.chips] == [80 * GIB, 80 * GIB]
    driver = Driver((12, 8), (Chip("NVIDIA A100-SXM4-80GB", "sm_80"),) * 2, None)
    assert judge_chips(driver, smi).found == "2 x NVIDIA A100-SXM4-80GB, sm_80, 80.0 GiB"
    assert judge_driver(driver, smi, 2).found == "NVIDIA driver 570.86.15, runs CUDA up to 12.8"
    one = driver._replace(chips=driver.chips[:1])
    assert judge_chips(one, smi).found == "NVIDIA A100-SXM4-80GB, sm_80 (2 in the machine)"


def test_an_nvidia_smi_that_does_not_know_capabilities_still_tells_the_rest(tmp_path):
    old = write_program(
        tmp_path / "nvidia-smi",
        'case "$*" in *compute_cap*) echo "Field \\"compute_cap\\" is not a valid field to query."; exit 2;; esac',
        "echo '450.80.02, Tesla T4, 15109'",
    )
    assert ask_smi(old) == Smi("450.80.02", (("Tesla T4", 15109 * 2**20, None),), None)


@pytest.mark.parametrize(
    ("lines", "remedy"),
    [
        (["echo 'Failed to initialize NVML: Driver/library version mismatch'", "exit 18"], "reboot"),
        (
            [
                'echo "NVIDIA-SMI has failed because it couldn\'t communicate with the NVIDIA driver."',
                "exit 9",
            ],
            "modprobe nvidia",
        ),
        (["exec sleep 60"], "Xid"),
    ],
    ids=["mismatch", "no module", "hangs"],
)
def test_an_nvidia_smi_that_fails_or_hangs_is_a_finding_with_a_remedy(tmp_path, lines, remedy):
    smi = ask_smi(write_program(tmp_path / "nvidia-smi", *lines), patience_seconds=1)
    found = judge_driver(NO_DRIVER, smi, n_on_bus=1)
    assert found.status == "warning"
    assert remedy in found.remedy


def test_chips_without_a_driver_are_seen_on_the_bus(tmp_path):
    for name, vendor, kind in (
        ("gpu", "0x10de", "0x030200"),
        ("sound", "0x10de", "0x040300"),
        ("nic", "0x8086", "0x0200"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "class").write_text(kind + "\n")
    assert count_chips_on_bus(tmp_path) == 1
    found = judge_driver(NO_DRIVER, NO_SMI, n_on_bus=1)
    assert found.status == "warning"
    assert "--gpus all" in found.remedy
    assert judge_driver(NO_DRIVER, NO_SMI, n_on_bus=0).status == "absent"


def test_a_container_with_chips_but_without_the_driver_s_library_is_told_so(tmp_path):
    smi = Smi("580.65.06", (), None)
    found = judge_driver(ask_driver(str(tmp_path / "libcuda.so.1")), smi, n_on_bus=1)
    assert found.status == "warning"
    assert "NVIDIA_DRIVER_CAPABILITIES" in found.remedy


# ---- what compiles


def test_no_compiler_is_a_finding_with_the_command_that_brings_one(tmp_path):
    found = find_compiler(("g++", "clang++"), str(tmp_path))
    assert found.status == "warning"
    assert "apt install g++" in found.remedy


def test_the_first_compiler_on_the_path_is_named_with_its_version(tmp_path):
    path = write_program(tmp_path / "clang++", "echo 'clang version 18.1.3'", "echo 'Target: x86_64'")
    found = find_compiler(("g++", "clang++"), str(tmp_path))
    assert found.status == "ok"
    assert found.facts == {"path": path, "version": "clang version 18.1.3"}
    write_program(
        tmp_path / "g++", "echo 'g++: error while loading shared libraries: libz.so' >&2", "exit 127"
    )
    broken = find_compiler(("g++", "clang++"), str(tmp_path))
    assert broken.status == "warning"
    assert "error while loading shared libraries" in broken.found
    must_have_remedy([broken])


def test_ninja_is_named_or_its_absence_repeated(tmp_path):
    def missing():
        raise BackendError("the program ninja was not found; install it with 'pip install ninja'")

    found = find_ninja_program(missing)
    assert (found.status, found.found) == ("warning", "the program ninja was not found")
    assert found.remedy == "install it with 'pip install ninja'"
    ninja = write_program(tmp_path / "ninja", "echo 1.13.1")
    assert find_ninja_program(lambda: Path(ninja)).facts == {"path": ninja, "version": "1.13.1"}


def write_nvcc(home, release):
    return write_program(
        home / "bin" / "nvcc",
        f'case "$1" in --version) echo "Cuda compilation tools, release {release}, V{release}.88";; '
        '*) printf "sm_80\\nsm_90\\n";; esac',
    )


@pytest.mark.parametrize(
    ("driver_cuda", "status"),
    [((13, 0), "ok"), ((13, 2), "ok"), ((12, 9), "warning"), (None, "ok")],
    ids=["same", "newer", "older driver", "no driver"],
)
def test_an_nvcc_whose_work_the_driver_does_not_run_is_noticed(tmp_path, driver_cuda, status):
    path = write_nvcc(tmp_path, "13.0")
    driver = Driver(driver_cuda, (), None)

    def find():
        return find_toolkit({"CUDA_HOME": str(tmp_path)})

    found = find_cuda_compiler(find, lambda: "/bin/true", driver, has_chips=True)
    assert found.status == status
    assert found.facts == {"path": path, "version": "13.0.88", "architectures": ["sm_80", "sm_90"]}
    if status == "warning":
        assert "update the driver" in found.remedy
        assert "580" in found.found


def test_an_nvcc_whose_c_compiler_is_missing_or_broken_is_noticed(tmp_path):
    write_nvcc(tmp_path / "toolkit", "13.0")
    broken = write_program(tmp_path / "broken-g++", "echo 'libz.so: cannot open' >&2", "exit 127")

    def found(given):
        return find_cuda_compiler(
            lambda: find_toolkit({"CUDA_HOME": str(tmp_path / "toolkit")}),
            lambda: host_compiler({"PATH": "/usr/bin:/bin", "NVCC_CCBIN": given}),
            NO_DRIVER,
            has_chips=True,
        )

    missing = found("none-such")
    assert missing.status == "warning"
    assert "but NVCC_CCBIN=none-such: there is no such compiler" in missing.found
    assert missing.remedy == "correct it, or unset it to use g++"
    assert f"but its C++ compiler {broken} does not work (libz.so: cannot open)" in found(broken).found
    must_have_remedy([found(broken)])


def test_nvcc_is_missed_only_where_there_are_chips():
    def missing():
        raise BackendError("nvcc was not found; install the CUDA toolkit")

    assert find_cuda_compiler(missing, host_compiler, NO_DRIVER, has_chips=False).status == "absent"
    found = find_cuda_compiler(missing, host_compiler, NO_DRIVER, has_chips=True)
    assert (found.status, found.remedy) == ("warning", "install the CUDA toolkit")


# ---- packages


def test_missing_and_unfit_packages_are_named_with_the_command_that_repairs_them():
    installed = {"torch": "2.9.1", "numpy": "2.1.0", "pydantic": "2.11.0"}
    wanted = [
        "torch>=2.11,<2.14",
        "numpy>=1.26",
        "rich>=13.7",
        "pydantic>=2.10; python_version >= '3'",
        "pywin32>=300; sys_platform == 'win32'",
    ]
    found = find_requirements(wanted, installed.get)
    assert found.status == "warning"
    assert found.facts == {"wanted": 4, "wrong": ["torch is 2.9.1, not <2.14,>=2.11", "rich is missing"]}
    assert found.remedy == "pip install 'torch<2.14,>=2.11' 'rich>=13.7'"
    assert find_requirements(wanted[1:2], installed.get).status == "ok"


def test_a_local_or_preview_version_of_a_package_counts():
    assert find_requirements(["torch>=2.11,<2.14"], {"torch": "2.13.0+cu130"}.get).status == "ok"
    assert find_requirements(["torch>=2.11,<2.14"], {"torch": "2.12.0.dev20260101+cu130"}.get).status == "ok"


def test_the_requirements_are_those_of_the_checkout_and_every_extra_is_looked_for(tmp_path):
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert read_requirements(CHECKOUT / "pyproject.toml") == project["dependencies"]
    assert {one.extra for one in EXTRAS if one.extra} == set(project["optional-dependencies"]) - {"dev"}
    noted = read_requirements(tmp_path / "no such file")
    assert any(requirement.startswith("torch") for requirement in noted)
    assert not any("pytest" in requirement for requirement in noted)


def test_an_extra_that_is_missing_says_what_it_is_for_and_how_to_get_it():
    by_id = {finding.id: finding for finding in find_extras(EXTRAS, {"gguf": "0.19.0"}.get)}
    assert by_id["gguf"].status == "ok"
    assert by_id["lm_eval"].status == "absent"
    assert by_id["lm_eval"].remedy == "pip install 'rwkv-train[lm-eval]'"


# ---- packages and backends that break when they are tried


def write_package(folder, name, content):
    path = folder / Path(*name.split("."))
    path.mkdir(parents=True, exist_ok=True)
    (path / "__init__.py").write_text(content)


def probe_with(folder, **options):
    return probe(lambda sentence: None, search_path=[str(folder), str(CHECKOUT), *sys.path], **options)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            "raise ImportError('libcudart.so.13: cannot open shared object file')",
            "libcudart.so.13: cannot open",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "signal 4 (SIGILL)"),
        (
            "import os; print('x' * 100_000); os.write(2, b'bad magic\\n'); os._exit(7)",
            "exit code 7: bad magic",
        ),
        ("raise SystemExit", "SystemExit"),
    ],
    ids=["library", "signal", "exit", "leaves"],
)
def test_a_torch_that_cannot_be_imported_is_a_finding_and_nothing_else_is_tried(tmp_path, content, problem):
    write_package(tmp_path, "torch", content)
    results = probe_with(tmp_path)
    assert list(results) == ["torch"]
    assert problem in results["torch"]["problem"]
    report = judge(results, NO_DRIVER, n_installed=0, requirements=["torch>=2.11,<2.14"])
    assert report.obstacles == (
        f"torch: cannot be imported ({results['torch']['problem']}); pip install --force-reinstall 'torch>=2.11,<2.14'",
    )
    must_have_remedy(report.findings)


def test_a_torch_that_hangs_is_ended(tmp_path):
    write_package(tmp_path, "torch", "import time; time.sleep(600)")
    results = probe_with(tmp_path, patience_seconds=3)
    assert results == {"torch": {"problem": "it did not end within 3 seconds"}}


SMALL_TORCH = """
class cuda:
    device_count = staticmethod(lambda: 0)
    get_arch_list = staticmethod(lambda: [])
class version:
    cuda = None
__version__ = "2.13.0"
get_num_threads = lambda: 1
"""


def test_a_package_that_ends_its_process_takes_nothing_else_with_it(tmp_path):
    write_package(tmp_path, "torch", SMALL_TORCH)
    write_package(tmp_path, "lightning", "")
    write_package(tmp_path, "lightning.pytorch", "import os; os.abort()")
    write_package(tmp_path, "deepspeed", "raise ValueError('no such accelerator')")
    results = probe_with(tmp_path)
    assert list(results) == ["torch", "backends", "lightning", "deepspeed"]
    assert results["torch"]["version"] == "2.13.0"
    assert signal.Signals.SIGABRT.name in results["lightning"]["problem"]
    assert results["deepspeed"] == {"problem": "no such accelerator", "kind": "ValueError"}


def test_the_progress_of_a_build_is_passed_on(tmp_path):
    write_package(
        tmp_path,
        "torch",
        "import logging; logging.getLogger('rwkv_train.ops').warning('building wkv7'); 1 / 0",
    )
    said = []
    probe(said.append, search_path=[str(tmp_path), str(CHECKOUT), *sys.path])
    assert said == ["building wkv7"]


# ---- what follows


def results_of(torch_facts=TORCH, device="cuda", **outcomes):
    """Trials that went well, but for ``outcomes``: name of a backend -> what came of it on that device."""
    results = {
        "torch": torch_facts,
        "backends": {"trials": [], "preferences": {}},
        "lightning": {"version": "2.6.0"},
        "training": {"device": device},
        "deepspeed": {"version": "0.19.0", "ops": {"cpu_adam": None, "fused_adam": None}},
    }
    place = "cuda:0" if device == "cuda" else device
    good = {"status": "available", "reason": None}
    names = ("cuda_exact", "torch", "reference")
    for op in OPS:
        for dtype in ("float32", "bfloat16"):
            results["backends"]["preferences"][f"{place} {op} {dtype}"] = names
            for backend in names:
                results[f"{place} {op} {backend} {dtype}"] = outcomes.get(backend, good)
    return results


def judged(results, driver=NO_DRIVER, n_installed=1):
    report = judge(results, driver, n_installed=n_installed, requirements=["torch>=2.11,<2.14"])
    must_have_remedy(report.findings)
    return report


def test_a_machine_where_all_is_well_can_train():
    report = judged(results_of(), Driver((13, 0), (Chip("NVIDIA H100", "sm_90"),), None))
    assert report.obstacles == ()
    assert report.to_json()["can_train"]
    assert {finding.status for finding in report.findings} == {"ok"}


def test_a_driver_older_than_torch_s_cuda_keeps_a_run_from_starting():
    # torch counts chips without starting CUDA, so training takes the GPU; then everything fails like this.
    said = "The NVIDIA driver on your system is too old (found version 12040)."
    fails = {"status": "fails", "reason": said, "is_lasting": False}
    results = results_of(
        TORCH | {"devices": [], "cuda_problem": said}, cuda_exact=fails, torch=fails, reference=fails
    )
    report = judged(results, Driver((12, 4), (Chip("NVIDIA H100", "sm_90"),), None))
    first, second = report.obstacles
    assert (
        "2.13.0, CUDA 13.0, but the driver runs CUDA up to 12.4; update the driver to 580 or later" in first
    )
    assert second.startswith("no backend of wkv4, wkv5, wkv6, wkv7 runs on cuda")


def test_a_torch_without_cuda_beside_chips_trains_on_the_cpu_and_says_so():
    torch = TORCH | {"version": "2.13.0+cpu", "cuda": None, "cuda_devices": 0, "devices": []}
    report = judged(results_of(torch, device="cpu"))
    assert report.obstacles == ()
    assert report.findings[0].status == "warning"
    assert "install a torch with CUDA" in report.findings[0].remedy
    assert judged(results_of(torch, device="cpu"), n_installed=0).findings[0].status == "ok"


def test_chips_that_are_hidden_from_torch_are_missed():
    report = judged(results_of(TORCH | {"cuda_devices": 0, "devices": []}, device="cpu"))
    assert report.findings[0].status == "warning"
    assert "CUDA_VISIBLE_DEVICES" in report.findings[0].remedy


def test_one_backend_for_each_operator_is_enough():
    bad = {"status": "unavailable", "reason": "nvcc was not found; install the CUDA toolkit"}
    report = judged(
        results_of(cuda_exact=bad, torch={"problem": "it ends the process by signal 11 (SIGSEGV)"})
    )
    assert report.obstacles == ()
    rows = {row.backend: row for row in report.backends}
    assert (rows["cuda_exact"].reason, rows["cuda_exact"].remedy) == (
        "nvcc was not found",
        "install the CUDA toolkit",
    )
    # "auto" only passes over what cannot be loaded; it does not see a crash coming.
    assert rows["torch"].status == "crashes"
    assert rows["torch"].is_auto
    assert "set trainer.wkv_backend to 'reference'" in rows["torch"].remedy


def test_an_operator_without_any_backend_keeps_a_run_from_starting():
    results = results_of()
    for name in results:
        if name.startswith("cuda:0 wkv6"):
            results[name] = {"status": "refuses", "reason": "it needs CPU tensors, not cuda"}
    assert judged(results).obstacles == ("no backend of wkv6 runs on cuda; see the table of backends",)


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (("available", "available", "available"), "cuda"),
        (("crashes", "unavailable", "available"), "cuda_exact"),
        (("available", "unavailable", "refuses"), None),
    ],
    ids=["all", "the first cannot be loaded", "none of its own"],
)
def test_auto_takes_the_first_of_its_preferences_that_can_be_loaded(statuses, expected):
    names = ("cuda_bf16", "cuda", "cuda_exact")  # the first is for those who ask for it
    results = {
        f"cuda:0 wkv7 {name} bfloat16": {"status": status, "reason": "it cannot; do without"}
        for name, status in zip(names, statuses, strict=True)
    }
    rows = judge_backends(results, {"cuda:0 wkv7 bfloat16": ("cuda", "cuda_exact")})
    assert [row.backend for row in rows if row.is_auto] == ([expected] if expected else [])


def test_what_auto_prefers_is_what_was_measured_to_be_faster(monkeypatch):
    from rwkv_train.ops import backends
    from rwkv_train.ops.crossover import Speeds
    from rwkv_train.planning.doctor.trials import _list_backends

    monkeypatch.setattr(backends, "speeds_for", lambda op, problem: Speeds({}, "nothing"))
    assert _list_backends()["preferences"]["cpu wkv7 bfloat16"] == [
        "cuda",
        "cuda_exact",
        "cpp",
        "torch",
        "reference",
    ]
    asked = []
    monkeypatch.setattr(
        backends, "speeds_for", lambda *given: asked.append(given) or Speeds({"torch": 1, "cpp": 2}, "here")
    )
    assert _list_backends()["preferences"]["cpu wkv7 float32"][:2] == ["torch", "cpp"]
    assert {(op, problem.n_recurrences) for op, problem in asked} == {
        ("wkv4", 256 * 64),
        *((op, 256) for op in ("wkv5", "wkv6", "wkv7")),
    }
    assert all(problem.needs_backward for _, problem in asked)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"status": "fails", "reason": "CUDA error: no kernel image is available"}, "names its architecture"),
        ({"status": "fails", "reason": "CUDA out of memory. Tried to allocate 2 MiB"}, "nvidia-smi names it"),
        ({"status": "wrong", "reason": "its numbers are wrong (relative error 2)"}, "report it"),
        (
            {"status": "unavailable", "reason": "does not compile: error; the whole output is in x.log"},
            "report it",
        ),
        (
            {"status": "unavailable", "reason": "the kernel cannot be had"},
            "see what is said of the compilers",
        ),
    ],
    ids=["architecture", "memory", "numbers", "compiles not", "no remedy of its own"],
)
def test_every_backend_that_does_not_work_has_a_remedy(facts, words):
    (row,) = judge_backends({"cuda:0 wkv7 cuda_exact bfloat16": facts}, {})
    assert words in row.remedy


@pytest.mark.parametrize(
    ("ops", "remedy"),
    [
        ({"cpu_adam": None, "fused_adam": "CUDA_HOME does not exist"}, "CUDA toolkit 13.0 (nvcc)"),
        ({"cpu_adam": "there is no compiler 'c++'"}, "install g++ and ninja"),
    ],
    ids=["fused", "cpu"],
)
def test_an_optimizer_of_deepspeed_that_cannot_be_compiled_is_named(ops, remedy):
    results = results_of() | {"deepspeed": {"version": "0.19.0", "ops": ops}}
    finding = judged(results).findings[-1]
    assert (finding.id, finding.status) == ("deepspeed_ops", "warning")
    assert remedy in finding.remedy


def test_training_needs_no_deepspeed():
    missing = {"problem": "No module named 'deepspeed'", "kind": "ModuleNotFoundError"}
    report = judged(results_of() | {"deepspeed": missing})
    assert report.obstacles == ()
    assert (report.findings[-1].status, "pip install deepspeed" in report.findings[-1].remedy) == (
        "absent",
        True,
    )


def test_a_lightning_that_is_missing_is_an_obstacle_and_what_follows_from_it_is_not():
    results = results_of() | {
        "lightning": {"problem": "No module named 'lightning'", "kind": "ModuleNotFoundError"}
    }
    del results["training"]
    report = judged(results)
    assert report.obstacles == (
        "lightning: cannot be imported (No module named 'lightning'); pip install 'lightning'",
    )


def test_a_package_that_only_training_imports_is_an_obstacle():
    results = results_of() | {
        "training": {"problem": "No module named 'pyarrow'", "kind": "ModuleNotFoundError"}
    }
    (obstacle,) = judged(results).obstacles
    assert obstacle.startswith(
        "training: cannot be imported (No module named 'pyarrow'); install rwkv-train anew"
    )


# ---- a backend that is really tried


def no_library():
    raise BackendError("no compiler; install g++")


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("half", "wrong", "relative error 0.75"),  # of the gradients of the sum of squares
        ("nan", "wrong", "relative error nan"),
        ("broken", "fails", "device-side assert"),
        ("unbuilt", "unavailable", "no compiler; install g++"),
        ("elsewhere", "refuses", "it needs another machine"),
        ("reference", "available", None),
    ],
)
def test_a_backend_is_held_to_the_float64_loop(monkeypatch, name, status, words):
    from rwkv_train.ops import backends
    from rwkv_train.ops.backends import Backend
    from rwkv_train.ops.prepare import OPERATORS
    from rwkv_train.planning.doctor.trials import try_backend

    reference = OPERATORS["wkv7"]["reference"]

    def scaled(factor):
        def run(*arguments):
            y, state = reference.run(*arguments)
            return factor * y, state

        return run

    def broken(*arguments):
        raise RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA")

    table = {
        "half": reference._replace(run=scaled(0.5)),
        "nan": reference._replace(run=scaled(float("nan"))),
        "broken": reference._replace(run=broken),
        "unbuilt": reference._replace(load=no_library),
        "elsewhere": Backend(lambda problem: "it needs another machine", no_library, broken),
        "reference": reference,
    }
    monkeypatch.setitem(backends._TABLES, "wkv7", table)
    monkeypatch.setitem(OPERATORS, "wkv7", table)
    for dtype in ("float32", "bfloat16"):
        facts = try_backend("cpu", "wkv7", name, dtype, failures={})
        assert facts["status"] == status
        assert facts["reason"] is None if words is None else words in facts["reason"]


def test_a_build_that_fails_is_tried_once(monkeypatch):
    from rwkv_train.ops.prepare import OPERATORS
    from rwkv_train.planning.doctor.trials import try_backend

    loads = []

    def load():
        loads.append(1)
        raise BackendError("it does not compile; install another compiler")

    table = {"slow": OPERATORS["wkv7"]["reference"]._replace(load=load)}
    monkeypatch.setitem(OPERATORS, "wkv7", table)
    failures = {}
    outcomes = [
        try_backend("cpu", "wkv7", "slow", dtype, failures=failures) for dtype in ("float32", "bfloat16")
    ]
    assert outcomes[0] == outcomes[1]
    assert loads == [1]
