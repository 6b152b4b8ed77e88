"""Other implementations beside ours: plug-ins, and flash-linear-attention's conventions."""

import sys
from types import ModuleType

import pytest
import torch

from rwkv_train.benchmarks import kernel_peers
from rwkv_train.benchmarks.kernel_peers import importable_peers, load_peer
from rwkv_train.benchmarks.kernel_sizes import KernelSize
from rwkv_train.benchmarks.kernels import bench_kernels
from rwkv_train.errors import ConfigError
from rwkv_train.ops.context import PLAIN, packed_context
from rwkv_train.ops.wkv4 import wkv4
from rwkv_train.ops.wkv6 import wkv6
from rwkv_train.ops.wkv7 import wkv7

PLUG_IN = """
def twice(r, w, k, v, a, b):
    return 2 * v, None

twice_is_not = 3
"""


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    (tmp_path / "plug_in_of_a_test.py").write_text(PLUG_IN)
    (tmp_path / "exiting_plug_in_of_a_test.py").write_text("raise SystemExit('no chip')\n")
    (tmp_path / "broken_plug_in_of_a_test.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "plug_in_of_a_test"
    sys.modules.pop("plug_in_of_a_test", None)


@pytest.mark.parametrize(
    ("prefix", "ops"),
    [("", ["wkv7"]), ("wkv7=", None), ("wkv7=", ["wkv6", "wkv7"])],
    ids=["by --op", "all", "some"],
)
def test_a_plug_in_is_called_what_its_function_is_called(plug_in, prefix, ops):
    peer = load_peer(f"{prefix}{plug_in}:twice", ops)
    assert (peer.name, peer.op) == ("twice", "wkv7")
    y, _ = peer.function(*torch.ones(6, 1))
    assert y == 2


@pytest.mark.parametrize(
    ("given", "ops", "sentence"),
    [
        ("plug_in_of_a_test", ["wkv7"], "wanted MODULE:FUNCTION"),
        ("plug_in_of_a_test:", ["wkv7"], "wanted MODULE:FUNCTION"),
        ("plug_in_of_a_test:twice", None, "does not say which operator the function computes; give one --op"),
        ("plug_in_of_a_test:twice", ["wkv6", "wkv7"], "does not say which operator"),
        ("wkv9=plug_in_of_a_test:twice", None, "there is no operator 'wkv9'"),
        ("wkv7=plug_in_of_a_test:twice", ["wkv6"], "computes wkv7, which is not measured; add --op wkv7"),
        ("wkv7=plug_in_of_a_test:thrice", None, "has no function thrice"),
        ("wkv7=plug_in_of_a_test:twice_is_not", None, "has no function twice_is_not"),
        ("wkv7=no_plug_in:twice", None, "No module named 'no_plug_in'"),
        ("wkv7=broken_plug_in_of_a_test:twice", None, "No module named 'no_such_module_anywhere'"),
        ("wkv7=exiting_plug_in_of_a_test:twice", None, "cannot be imported: SystemExit: no chip"),
    ],
    ids=[
        "form",
        "no name",
        "no op",
        "two ops",
        "op",
        "other op",
        "function",
        "number",
        "module",
        "broken",
        "exiting",
    ],
)
def test_a_plug_in_that_is_not_there_is_refused(plug_in, given, ops, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_peer(given, ops)


def stand_in_for_fla():
    """Modules with flash-linear-attention's documented conventions, computed by our references.

    States are ``[key, value]``; r is scaled by ``1 / sqrt(N)`` unless told otherwise; RWKV-4 takes the logarithm of
    the decay rate.
    """

    def context_of(cu_seqlens):
        return PLAIN if cu_seqlens is None else packed_context(cu_seqlens)

    def rwkv7(
        r, w, k, v, a, b, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, **options
    ):
        r = r * (r.shape[-1] ** -0.5 if scale is None else scale)
        y, state = wkv7(r, w, k, v, a, b, initial_state, context_of(cu_seqlens), backend="reference")
        return y, state.mT if output_final_state else None

    def rwkv6(r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
        r = r * (r.shape[-1] ** -0.5 if scale is None else scale)
        y, state = wkv6(r, w, k, v, u, initial_state, context_of(cu_seqlens), backend="reference")
        return y, state.mT if output_final_state else None

    def rwkv4(w, u, k, v, state):
        y, final = wkv4(-torch.exp(w.float()), u, k, v, state.squeeze(2), PLAIN, backend="reference")
        return y, final.unsqueeze(2)

    functions = {
        "fla": {"__version__": "0.0"},
        "fla.ops": {},
        "fla.ops.rwkv7": {"chunk_rwkv7": rwkv7, "fused_recurrent_rwkv7": rwkv7},
        "fla.ops.rwkv6": {"chunk_rwkv6": rwkv6, "fused_recurrent_rwkv6": rwkv6},
        "fla.ops.rwkv4": {"fused_recurrent_rwkv4": rwkv4},
    }
    modules = {}
    for name, members in functions.items():
        modules[name] = ModuleType(name)
        modules[name].__dict__.update(members)
    return modules


@pytest.fixture
def fla(monkeypatch):
    for name, module in stand_in_for_fla().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(kernel_peers, "_is_installed", lambda name: True)
    peers, left_out = importable_peers("cuda")
    assert left_out is None
    return peers


@pytest.mark.parametrize(
    "size",
    [
        KernelSize("wkv7", B=2, T=5, H=2, N=8),
        KernelSize("wkv7", B=2, T=5, H=2, N=8, packed=True),
        KernelSize("wkv6", B=2, T=5, H=2, N=8),
        KernelSize("wkv6", B=2, T=5, H=2, N=8, packed=True),
        KernelSize("wkv5", B=2, T=5, H=2, N=8),
        KernelSize("wkv4", B=2, T=5, H=1, N=16),
    ],
    ids=lambda size: f"{size.op} {size.label}",
)
def test_flash_linear_attention_is_given_its_own_conventions(fla, size):
    rows = bench_kernels([size], ("reference",), 1, peers=fla, stopwatch=lambda call: 1.0)
    expected = {"reference", "fla_recurrent"} | ({"fla_chunk"} if size.op != "wkv4" else set())
    assert {row["backend"] for row in rows} == expected
    assert all(row["failed"] is None and row["difference"] < 1e-5 for row in rows)


def test_its_recurrence_of_rwkv_4_has_no_packed_rows(fla):
    size = KernelSize("wkv4", B=2, T=5, H=1, N=16, packed=True)
    rows = bench_kernels([size], ("reference",), 1, peers=fla, stopwatch=lambda call: 1.0)
    assert "cu_seqlens" in rows[-1]["failed"]


@pytest.mark.parametrize(
    "size", [KernelSize("wkv7", 2, 5, 2, 8), KernelSize("wkv6", 2, 5, 2, 8)], ids=["7", "6"]
)
def test_its_final_state_is_turned_round(fla, size):
    from rwkv_train.benchmarks.kernel_inputs import make_inputs

    inputs = make_inputs(size, torch.device("cpu"), torch.float32)
    operator = {"wkv7": wkv7, "wkv6": wkv6}[size.op]
    _, expected = operator(*inputs.tensors, None, PLAIN, backend="reference")
    for peer in fla:
        if peer.op == size.op:
            torch.testing.assert_close(peer.function(*inputs.tensors)[1], expected)


def test_versions_are_those_of_what_is_installed(monkeypatch):
    def version(name):
        if name == "triton":
            raise kernel_peers.importlib.metadata.PackageNotFoundError(name)
        return "0.6.0"

    monkeypatch.setattr(kernel_peers.importlib.metadata, "version", version)
    assert kernel_peers.peer_versions() == {"flash-linear-attention": "0.6.0"}


def test_on_a_cpu_no_peer_is_looked_for():
    assert importable_peers("cpu") == ([], None)


def test_a_peer_that_is_not_installed_is_left_out_with_a_sentence(monkeypatch):
    monkeypatch.setattr(kernel_peers, "_is_installed", lambda name: False)
    peers, left_out = importable_peers("cuda")
    assert peers == []
    assert "pip install flash-linear-attention" in left_out


def test_a_peer_that_cannot_be_imported_is_left_out_with_a_sentence(monkeypatch):
    monkeypatch.setattr(kernel_peers, "_is_installed", lambda name: True)
    for name in ("fla", "fla.ops", "fla.ops.rwkv4"):
        monkeypatch.setitem(sys.modules, name, None)
    peers, left_out = importable_peers("cuda")
    assert peers == []
    assert left_out.startswith(
        "flash-linear-attention cannot be imported; it is left out: ModuleNotFoundError"
    )
