"""The loss of a linear layer in chunks: against float64 autograd of plain PyTorch, and what it may not do."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkv_train.ops import cross_entropy
from rwkv_train.ops.cross_entropy import linear_cross_entropy, working_bytes

B, T, C, V = 2, 7, 6, 11
IGNORED = -100
FACTOR = 0.3

KEPT = pytest.mark.parametrize("keep_logits", [True, False], ids=["kept", "computed again"])
CHUNKS = pytest.mark.parametrize("chunk_rows", [None, 1, 3, 5], ids=["one chunk", "by row", "by 3", "by 5"])


@pytest.fixture
def cut(monkeypatch):
    """Cut all rows into chunks of so many rows, those into parts of two rows; ``None``: leave them whole."""

    def into(chunk_rows, vocab_size=V):
        if chunk_rows is not None:
            monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", chunk_rows * vocab_size)
            for name in ("PART_LOGITS", "CPU_PART_LOGITS"):
                monkeypatch.setattr(cross_entropy, name, 2 * vocab_size)

    return into


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(dtype=torch.float64, rows=(B, T)):
    """Input, weight, targets of which two are ignored, and gradients of losses and penalties, each its own."""
    targets = torch.randint(V, rows, generator=torch.Generator().manual_seed(1))
    if targets.numel() > 2:
        targets.view(-1)[[1, -1]] = IGNORED
    x = random(*rows, C).to(dtype).requires_grad_()
    weight = random(V, C, seed=2).to(dtype).requires_grad_()
    return x, weight, targets, random(*rows, seed=3), random(*rows, seed=4)


def plain(x, weight, targets):
    """Return losses and penalties as PyTorch computes them, from all logits."""
    logits = F.linear(x, weight)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    penalties = logits.amax(-1).square() / 2 * (targets != IGNORED)
    return losses.view_as(targets), penalties


def fused(x, weight, targets, **options):
    return linear_cross_entropy(x, weight, targets, ignore_index=IGNORED, with_penalty=True, **options)


def outputs_and_gradients(function, x, weight, targets, d_losses, d_penalties):
    losses, penalties = function(x, weight, targets)
    weighted = (losses * d_losses).sum() + (penalties * d_penalties).sum()
    return losses, penalties, *torch.autograd.grad(weighted, (x, weight))


class Watch(TorchDispatchMode):
    """Counts matrix products and the memory of what operations return while it lives."""

    def __init__(self):
        super().__init__()
        self.n_products = self.bytes = self.peak_bytes = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n_products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        given = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in given | self._known:
                self._add(storage)
        return outputs

    def _add(self, storage):
        address, size = storage._cdata, storage.nbytes()
        self._known.add(address)
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)

        def free():
            self.bytes -= size
            self._known.discard(address)

        weakref.finalize(storage, free)


def backward_arguments(vocab_size, n_rows, *, keep, dtype=torch.float32, weight_dtype=None, width=C):
    """What the backward takes, but for the gradients that are wanted."""
    x = random(n_rows, width).to(dtype)
    weight = random(vocab_size, width, seed=2).to(weight_dtype or dtype)
    targets = torch.arange(n_rows) % vocab_size
    losses, penalties, largest_ids, kept = cross_entropy._forward(x, weight, targets, IGNORED, True, keep)
    return x, weight, targets, IGNORED, largest_ids, kept, losses, penalties


@KEPT
@CHUNKS
def test_losses_penalties_and_gradients_are_those_of_plain_pytorch(cut, keep_logits, chunk_rows):
    cut(chunk_rows)
    expected = outputs_and_gradients(plain, *problem())
    found = outputs_and_gradients(lambda *given: fused(*given, keep_logits=keep_logits), *problem())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@KEPT
@pytest.mark.parametrize("rows", [(0, 3), (1, 1), (4, 1)], ids=["no row", "one row", "four rows"])
def test_any_number_of_rows_will_do(cut, keep_logits, rows):
    cut(3)
    expected = outputs_and_gradients(plain, *problem(rows=rows))
    found = outputs_and_gradients(lambda *given: fused(*given, keep_logits=keep_logits), *problem(rows=rows))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@KEPT
def test_gradients_agree_with_finite_differences(cut, keep_logits):
    cut(5)
    x, weight, targets, _, _ = problem()
    assert torch.autograd.gradcheck(
        lambda x, w: fused(x, w, targets, keep_logits=keep_logits), (x, weight), fast_mode=True
    )


def test_rows_that_do_not_lie_side_by_side_are_taken(cut):
    cut(3)
    x, *rest = problem()
    strided = x.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    assert not strided.is_contiguous()
    expected = outputs_and_gradients(plain, x, *rest)
    torch.testing.assert_close(outputs_and_gradients(fused, strided, *rest), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softmax_and_losses_are_in_float32(dtype):
    x, weight, targets, _, _ = problem(dtype)
    losses, penalties = fused(x, weight, targets)
    exact = plain(F.linear(x, weight).double(), torch.eye(V, dtype=torch.float64), targets)
    assert losses.dtype == penalties.dtype == torch.float32
    torch.testing.assert_close((losses.double(), penalties.double()), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_logits_kept_and_computed_again_give_the_same_bits(cut, autocast):
    cut(3)

    def run(keep_logits):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return outputs_and_gradients(
                lambda *given: fused(*given, keep_logits=keep_logits), *problem(torch.float32)
            )

    assert all(torch.equal(x, y) for x, y in zip(run(True), run(False), strict=True))


def test_autocast_rounds_what_it_rounds_for_a_linear_layer():
    x, weight, targets, _, _ = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = fused(x, weight, targets)
        logits = F.linear(x, weight).double()
    assert found[0].dtype == torch.float32
    expected = plain(logits, torch.eye(V, dtype=torch.float64), targets)
    torch.testing.assert_close([y.double() for y in found], list(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_gradient_of_a_weight_in_bfloat16_is_summed_in_float32(cut, weight_dtype):
    """Rows whose gradients have one sign: a sum in bfloat16 is soon too large for what is added to it."""
    cut(1)
    n_rows = 400
    x = (1 + 0.1 * random(1, n_rows, C)).bfloat16()
    weight = (0.1 * random(V, C, seed=2)).to(weight_dtype).requires_grad_()
    targets = torch.zeros(1, n_rows, dtype=torch.int64)
    exact = weight.detach().double().requires_grad_()
    plain(x.double(), exact, targets)[0].sum().backward()

    with torch.autocast("cpu", torch.bfloat16, enabled=weight_dtype == torch.float32):
        losses, _ = linear_cross_entropy(x, weight, targets, ignore_index=IGNORED)
    losses.sum().backward()

    def error(gradient):
        return ((gradient.double() - exact.grad).abs().amax() / exact.grad.abs().amax()).item()

    assert weight.grad.dtype == weight_dtype
    # Half a unit of the last place of the result and, averaged over the rows, of each row's gradient.
    assert error(weight.grad) < 2**-8
    d_logits = torch.softmax(x[0].double() @ exact.detach().T, 1)
    d_logits[:, 0] -= 1
    narrow = torch.zeros(V, C, dtype=torch.bfloat16)
    for rows in torch.arange(n_rows).split(1):
        narrow += (d_logits[rows].T @ x[0, rows].double()).bfloat16()
    assert error(narrow) > 10 * 2**-8


@KEPT
def test_of_ignored_targets_alone_everything_is_zero(cut, keep_logits):
    cut(3)
    x, weight, targets, _, _ = problem(torch.float32)
    losses, penalties = fused(x, weight, torch.full_like(targets, IGNORED), keep_logits=keep_logits)
    (losses + penalties).sum().backward()
    assert not any(y.any() for y in (losses, penalties, x.grad, weight.grad))


@KEPT
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_gradient_that_nobody_wants_is_not_computed(keep_logits, frozen):
    inputs = dict(zip(("x", "weight", "targets"), problem()[:3], strict=True))
    inputs[frozen].requires_grad_(False)
    losses, _ = fused(**inputs, keep_logits=keep_logits)
    calls = []

    def count(*arguments):
        calls.append(arguments[-2:])
        return cross_entropy._backward_shapes(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.rwkv_train, "linear_cross_entropy_backward", count)
        losses.sum().backward()
    assert calls == [(frozen != "x", frozen != "weight")]
    assert inputs[frozen].grad is None


@pytest.mark.parametrize(
    ("wants_x", "wants_weight", "n_products"), [(True, False, 1), (False, True, 1), (True, True, 2)]
)
def test_each_gradient_costs_one_product(wants_x, wants_weight, n_products):
    arguments = backward_arguments(V, 5, keep=True)
    with Watch() as watch:
        d_x, d_weight = cross_entropy._backward(*arguments, wants_x, wants_weight)
    assert watch.n_products == n_products
    assert (d_x.numel() > 0, d_weight.numel() > 0) == (wants_x, wants_weight)


def test_a_graph_that_is_kept_gives_its_gradients_twice():
    """Kept logits are not overwritten."""
    x, weight, targets, _, _ = problem()
    losses, _ = fused(x, weight, targets)
    once, again = (torch.autograd.grad(losses.sum(), (x, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@KEPT
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["float32", "autocast", "bfloat16"],
)
def test_a_backward_needs_the_memory_that_is_said(cut, monkeypatch, keep_logits, dtype, weight_dtype):
    n_rows, width, vocab_size = 60, 4, 5000
    cut(10, vocab_size)
    # As on a GPU; a CPU widens the factors.
    monkeypatch.setattr(cross_entropy, "_add_product", lambda total, a, b: None)
    arguments = backward_arguments(
        vocab_size, n_rows, keep=keep_logits, dtype=dtype, weight_dtype=weight_dtype, width=width
    )
    with Watch() as watch:
        cross_entropy._backward(*arguments, True, True)
    said = working_bytes(n_rows, width, vocab_size, dtype, weight_dtype)
    rows = 100 * n_rows  # ids, masks, a value of each row
    assert said <= watch.peak_bytes <= said + rows


def test_without_gradients_there_are_never_all_logits(cut):
    n_rows, vocab_size = 60, 5000
    cut(10, vocab_size)
    x, weight, targets = (
        random(1, n_rows, C),
        random(vocab_size, C),
        torch.zeros(1, n_rows, dtype=torch.int64),
    )
    with Watch() as watch:
        cross_entropy._forward(x[0], weight, targets[0], IGNORED, True, False)
    assert watch.peak_bytes < 8 * vocab_size * (10 + 2) + 100 * n_rows

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        kept = []
        patch.setattr(
            torch.ops.rwkv_train,
            "linear_cross_entropy",
            lambda *given: kept.append(given[-1]) or cross_entropy._forward_shapes(*given),
        )
        fused(x, weight.requires_grad_(), targets)
    assert kept == [False]


@pytest.mark.parametrize(("n_bytes", "n_kept"), [(8 * B * T * V, B * T * V), (8 * B * T * V - 1, 0)])
def test_logits_are_kept_up_to_a_bound(monkeypatch, n_bytes, n_kept):
    monkeypatch.setattr(cross_entropy, "KEPT_BYTES", n_bytes)
    x, weight, targets, _, _ = problem()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: saved.append(y.numel()) or y, lambda y: y):
        fused(x, weight, targets)
    assert sum(saved) == n_kept + x.numel() + weight.numel() + 2 * targets.numel()


@KEPT
def test_nothing_depends_on_values_so_nothing_waits_for_the_device(cut, keep_logits):
    """Tensors without values: ``.item()``, a mask as an index and the like fail on them."""
    cut(3)
    with FakeTensorMode():
        x, weight = torch.empty(B * T, C, dtype=torch.bfloat16), torch.empty(V, C)
        targets = torch.empty(B * T, dtype=torch.int64)
        losses, penalties, ids, kept = cross_entropy._forward(x, weight, targets, IGNORED, True, keep_logits)
        d_x, d_weight = cross_entropy._backward(
            x, weight, targets, IGNORED, ids, kept, losses, penalties, True, True
        )
    assert (losses.shape, d_x.shape, d_weight.shape) == ((B * T,), (B * T, C), (V, C))
    assert (losses.dtype, d_x.dtype, d_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)


@KEPT
@pytest.mark.parametrize("with_penalty", [True, False])
def test_the_operators_pass_opcheck(keep_logits, with_penalty):
    x, weight, targets, _, _ = problem(torch.float32)
    rows = (x.detach()[0].requires_grad_(), weight, targets[0])
    torch.library.opcheck(
        torch.ops.rwkv_train.linear_cross_entropy.default, (*rows, IGNORED, with_penalty, keep_logits)
    )
    losses, penalties, ids, kept = torch.ops.rwkv_train.linear_cross_entropy(
        rows[0].detach(), weight.detach(), targets[0], IGNORED, with_penalty, keep_logits
    )
    torch.library.opcheck(
        torch.ops.rwkv_train.linear_cross_entropy_backward.default,
        (rows[0].detach(), weight.detach(), targets[0], IGNORED, ids, kept, losses, penalties, True, True),
    )


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_compiled_as_one_graph_it_gives_the_same_bits(autocast, frozen):
    torch.compiler.reset()
    x, weight, targets, d_losses, _ = problem(torch.float32)
    wanted = (x,) if frozen else (x, weight)
    weight.requires_grad_(not frozen)

    def run(function):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses, penalties = function(x, weight, targets)
        return losses, *torch.autograd.grad((losses * d_losses + penalties).sum(), wanted)

    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(run(compiled), run(fused), strict=True))


def test_a_second_derivative_is_refused():
    x, weight, targets, _, _ = problem()
    losses, _ = fused(x, weight, targets)
    (d_x,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy has no second derivative"):
        d_x.sum().backward()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, w, t: (x[..., 1:], w, t), r"got \(2, 7, 5\), \(11, 6\), \(2, 7\)"),
        (lambda x, w, t: (x, w, t[:1]), r"got \(2, 7, 6\), \(11, 6\), \(1, 7\)"),
        (
            lambda x, w, t: (x, w.bfloat16(), t),
            "x .torch.float64. and weight .torch.bfloat16. must have one dtype",
        ),
    ],
    ids=["width", "targets", "dtype"],
)
def test_what_does_not_fit_is_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        fused(*change(*problem()[:3]))
