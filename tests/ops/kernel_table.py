"""What holds for all CUDA kernels of the operators, on a GPU as over the emulation.

A class for a family of kernels (``exact_table.py``, ``chunked_table.py``) adds what they are held to; a class of a test
module the platform. Expected values are those of the float64 loop, on the CPU.
"""

from typing import Any, ClassVar

import pytest
import torch

from rwkv_train.ops.compiled import addresses
from rwkv_train.ops.context import PLAIN, packed_context
from rwkv_train.ops.cuda import DTYPE_CODES, Platform
from rwkv_train.ops.cuda_recurrence import FLOAT32_INPUTS
from rwkv_train.ops.prepare import OPERATORS
from tests.ops.exact_kernels import CudaKernel
from tests.ops.test_cpp_memory import Guarded
from tests.ops.test_packed import boundaries, relative_error, results
from tests.ops.test_recurrences import final_log_scale

# A number rounded to the nearest is off by at most half of the distance to the next one; they have 8 and 11 bits.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

packed_or_plain = pytest.mark.parametrize("lengths", [None, [20, 0, 1, 34]], ids=["plain", "packed"])


def loss(outputs):
    y, final_state = outputs
    return y.square().sum() + final_state[:, :2].square().sum()


class KernelTable:
    """Tests that ask for ``op`` and ``form`` run for ``forms``, those that ask for ``op`` alone with ``main_form``."""

    platform: ClassVar[Platform]
    kernels: ClassVar[dict[tuple[str, str], CudaKernel]]
    device: ClassVar[str]
    forms: ClassVar[list[tuple[str, str]]]
    """Operators, each with a form of its kernels."""
    main_form: ClassVar[str]
    """The one that chooses by sizes, which is what models get. PyTorch sees no difference between forms."""

    def problem(self, operator, op, lengths=None, **options):
        """Inputs of a plain batch or a packed row, of sizes and dtypes that the kernels are for."""
        raise NotImplementedError

    def bound(self, op, form=None):
        """Relative error of norms that every output of a form may have for such a problem."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc):
        given = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
        if any("op" in names for names in given):
            return
        if "form" in metafunc.fixturenames:
            metafunc.parametrize(("op", "form"), self.forms, ids=[f"{op}{form}" for op, form in self.forms])
        elif "op" in metafunc.fixturenames:
            metafunc.parametrize("op", list(dict.fromkeys(op for op, _ in self.forms)))

    @pytest.fixture(autouse=True)
    def _in_the_tables(self, monkeypatch):
        for (op, _), kernel in self.kernels.items():
            monkeypatch.setitem(OPERATORS[op], kernel.backend, kernel.row)
        torch.compiler.reset()  # PyTorch refuses to compile one function for too many kinds of arguments

    def backend(self, op, form=None):
        return self.kernels[op, self.main_form if form is None else form].backend

    def here(self, problem):
        """A problem with its tensors on the device."""
        return type(problem)(
            tuple(x.to(self.device) for x in problem.inputs), *(x.to(self.device) for x in problem[1:])
        )

    def context(self, lengths):
        return packed_context(boundaries(lengths).to(self.device)) if lengths else PLAIN

    def results(self, operator, op, problem, lengths, form=None, log_scale=None):
        """y, the final state and all gradients through both, by the kernel, in the dtypes of the inputs."""
        if log_scale is not None:
            log_scale = log_scale.to(self.device)
        here, context = self.here(problem), self.context(lengths)
        return results(op, operator.run, here, context, self.backend(op, form), None, log_scale)

    def expected(self, operator, op, problem):
        """The same of a plain batch by the float64 loop, and wkv4's log scales."""
        log_scale = final_log_scale(problem) if op == "wkv4" else None
        return results(op, operator.run, problem, PLAIN, "reference", torch.float64, log_scale), log_scale

    def assert_close(self, op, form, found, expected):
        errors = [relative_error(x.cpu(), y) for x, y in zip(found, expected, strict=True)]
        assert max(errors) < self.bound(op, form), errors

    def assert_alike(self, op, form, found, others):
        """Neither is the truth; each may be off by the bound."""
        errors = [relative_error(x, y) for x, y in zip(found, others, strict=True)]
        assert max(errors) < 2 * self.bound(op, form), errors

    # ---- packed rows

    def test_one_sequence_gives_the_bits_of_a_plain_batch_of_one(self, operators, op, form):
        problem = self.problem(operators[op], op, [40])
        scale = torch.zeros(1, 1, 1, dtype=torch.float64)
        packed, plain = (
            self.results(operators[op], op, problem, lengths, form, scale) for lengths in ([40], None)
        )
        assert all(torch.equal(x, y) for x, y in zip(packed, plain, strict=True))

    def test_a_sequence_sees_nothing_of_those_beside_it(self, operators, op, form):
        """Not even that all of them is NaN; and gradients are as blind as outputs."""
        operator, lengths = operators[op], [33, 20, 9]
        problem = self.problem(operator, op, lengths)
        inputs, dy = [x.clone() for x in problem.inputs], problem.dy.clone()
        state, d_final = inputs[-1], problem.d_final.clone()
        for s, tokens in ((0, slice(33)), (2, slice(53, None))):
            for i, x in enumerate(inputs[:-1]):
                if i not in operator.shared:
                    x[:, tokens] = torch.nan
            dy[:, tokens] = torch.nan
            state[s] = d_final[s] = torch.nan
        scale = torch.zeros(3, 1, 1, dtype=torch.float64)
        before = self.results(operator, op, problem, lengths, form, scale)
        after = self.results(operator, op, type(problem)(tuple(inputs), dy, d_final), lengths, form, scale)
        shared = [2 + i for i in operator.shared]
        for i, (x, y) in enumerate(zip(before, after, strict=True)):
            by_sequence = x.shape[0] == 3
            if i not in shared:
                assert torch.equal(*((z[1] if by_sequence else z[:, 33:53]) for z in (x, y))), i
                assert y[0].isnan().any()

    def test_an_empty_sequence_hands_its_state_and_its_gradient_on(self, operators, op, form):
        operator = operators[op]
        *inputs, state = self.here(self.problem(operator, op, [3, 0, 2, 0])).inputs
        state = state.clone().requires_grad_()
        _, final = operator.run(*inputs, state, self.context([3, 0, 2, 0]), backend=self.backend(op, form))
        d_final = torch.rand(final.shape, generator=torch.Generator().manual_seed(1)).to(self.device)
        (d_state,) = torch.autograd.grad(final, state, d_final)
        for s in (1, 3):
            assert torch.equal(final[s], state[s])
            assert torch.equal(d_state[s], d_final[s])

    # ---- what every operator promises

    def test_the_same_call_gives_the_same_bits(self, operators, op, form):
        operator, lengths = operators[op], [40, 0, 37]
        problem = self.problem(operator, op, lengths)
        scale = torch.zeros(3, 1, 1, dtype=torch.float64)
        first, again = (self.results(operator, op, problem, lengths, form, scale) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))

    def test_views_with_gaps_are_read_as_what_they_show(self, operators, op, form):
        problem, scale = self.problem(operators[op], op), torch.zeros(2, 1, 1, dtype=torch.float64)
        views = [torch.stack((x, x + 1), dim=-1)[..., 0] for x in problem.inputs]
        assert not views[0].is_contiguous()
        expected, found = (
            self.results(operators[op], op, problem._replace(inputs=tuple(x)), None, form, scale)
            for x in (problem.inputs, views)
        )
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

    @pytest.mark.parametrize("output", [0, 1], ids=["y", "final-state"])
    def test_a_gradient_through_one_output_alone_is_right(self, operators, op, form, output):
        operator, problem = operators[op], self.problem(operators[op], op)

        def gradient(backend, inputs):
            k = inputs[2].requires_grad_()
            outputs = operator.run(*inputs, PLAIN, backend=backend)
            return torch.autograd.grad(outputs[output][:, :2].sum(), k)[0].cpu()

        found = gradient(self.backend(op, form), [x.clone() for x in self.here(problem).inputs])
        expected = gradient("reference", [x.double() for x in problem.inputs])
        self.assert_close(op, form, [found], [expected])

    def test_a_nan_is_not_hidden(self, operators, op, form):
        problem = self.here(self.problem(operators[op], op))
        for i, x in enumerate(problem.inputs):
            inputs = list(problem.inputs)
            inputs[i] = x.clone()
            inputs[i].view(-1)[0] = torch.nan
            y, _ = operators[op].run(*inputs, PLAIN, backend=self.backend(op, form))
            assert y.isnan().any(), i

    @pytest.mark.parametrize("batch", [0, 2])
    def test_no_tokens_or_no_rows_leave_the_state_as_it_is(self, operators, op, form, batch):
        problem = self.here(self.problem(operators[op], op, batch=batch, n_tokens=0 if batch else 5))
        inputs = [x.requires_grad_() for x in problem.inputs]
        y, final_state = operators[op].run(*inputs, PLAIN, backend=self.backend(op, form))
        assert y.shape == problem.dy.shape
        assert torch.equal(final_state, problem.inputs[-1])
        gradients = torch.autograd.grad(
            y.sum() + final_state.sum(), inputs, materialize_grads=True, allow_unused=True
        )
        assert [x.shape for x in gradients] == [x.shape for x in inputs]
        assert all(not x.any() for x in gradients[:-1])

    @pytest.mark.parametrize("split", [1, 8, 17, 32, 40])
    def test_the_state_carries_everything_across_a_split(self, operators, op, form, split):
        operator, problem = operators[op], self.here(self.problem(operators[op], op, n_tokens=41))
        *inputs, start = problem.inputs
        by_token = [x.shape == problem.dy.shape for x in inputs]

        def run(tokens, state):
            piece = [x[:, tokens] if cut else x for x, cut in zip(inputs, by_token, strict=True)]
            return operator.run(*piece, state, PLAIN, backend=self.backend(op, form))

        whole, final = run(slice(None), start)
        head, middle = run(slice(split), start)
        tail, end = run(slice(split, None), middle)
        self.assert_alike(op, form, (torch.cat([head, tail], dim=1), end), (whole, final))

    def test_tensors_that_begin_anywhere_in_their_memory_are_read(self, operators, op, form):
        operator, problem = operators[op], self.here(self.problem(operators[op], op))
        moved = []
        for x in problem.inputs:
            memory = x.new_empty(x.numel() + 1)
            moved.append(memory[1:].view(x.shape).copy_(x))
            assert moved[-1].data_ptr() % 16 == x.element_size()
        expected = operator.run(*problem.inputs, PLAIN, backend=self.backend(op, form))
        found = operator.run(*moved, PLAIN, backend=self.backend(op, form))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

    # ---- memory: the functions called with raw addresses, as Python does

    def call_with_guards(self, operator, op, form, size, lengths, starts, dtype):
        """Run forward and backward on outputs and scratch full of NaN, all amid guards; return what was written."""
        kernel, (n_head, head_size) = self.kernels[op, form], size
        n_tokens, n_sequences = sum(lengths), len(lengths)
        sizes = (n_head * head_size,) if op == "wkv4" else size
        problem = operator.packed_problem(
            lengths, **({"n_embd": sizes[0]} if op == "wkv4" else {"n_head": n_head, "head_size": head_size})
        )
        state = problem.inputs[-1]
        library = kernel.load()
        function = {
            name: getattr(library, f"rwkv_{op}_{name}{form}")
            for name in ("forward", "backward", "workspace_bytes")
        }

        guarded = Guarded(self.device)
        by_dtype = [name not in FLOAT32_INPUTS for name in kernel.signature.inputs]
        inputs = [
            guarded.copy(x.to(dtype if yes else torch.float32))
            for x, yes in zip(problem.inputs, by_dtype, strict=True)
        ]
        y, final_state = guarded.output(*problem.dy.shape, dtype=dtype), guarded.output(*state.shape)
        n_checkpoints = n_tokens // kernel.signature.checkpoint_tokens + n_sequences
        checkpoints = guarded.output(n_checkpoints, *state.shape[1:], dtype=kernel.signature.checkpoint_dtype)
        gradients = [
            guarded.output(*shape, dtype=dtype if yes else torch.float32)
            for shape, yes in zip(
                kernel.signature.gradient_shapes([*inputs[:-1], state]), by_dtype, strict=True
            )
        ]
        dy, d_final = guarded.copy(problem.dy.to(dtype)), guarded.copy(torch.ones_like(state))

        stream, code = self.platform.current_stream(torch.device(self.device)), DTYPE_CODES[dtype]
        for is_backward, tensors in (
            (False, (*inputs, y, final_state, checkpoints)),
            (True, (*inputs[:-1], checkpoints, dy, d_final, *gradients)),
        ):
            n_bytes = function["workspace_bytes"](is_backward, n_sequences, n_tokens, *sizes)
            assert n_bytes % 4 == 0
            scratch = guarded.output(n_bytes // 4)
            error = function["backward" if is_backward else "forward"](
                code, n_sequences, n_tokens, *sizes, *addresses(starts, *tensors, scratch), stream
            )
            assert error == 0, getattr(library, f"rwkv_{op}_error")(error).decode()
        guarded.assert_untouched()
        return y, final_state, *gradients

    # ---- PyTorch

    def operator_call(self, operators, op, lengths):
        """Return (function of the tensors, fresh inputs that want gradients, cu_seqlens)."""
        operator, context = operators[op], self.context(lengths)
        problem = self.here(self.problem(operator, op, lengths))
        inputs = [x.clone().requires_grad_() for x in problem.inputs]
        return (lambda *x: operator.run(*x, context, backend=self.backend(op))), inputs, context.cu_seqlens

    @packed_or_plain
    def test_both_operators_pass_opcheck(self, operators, op, lengths):
        name = f"{op}_{self.backend(op)}"
        forward, backward = (
            getattr(torch.ops.rwkv_train, part).default for part in (name, f"{name}_backward")
        )
        _, inputs, cu_seqlens = self.operator_call(operators, op, lengths)
        torch.library.opcheck(forward, (*inputs, cu_seqlens, True))
        inputs = [x.detach() for x in inputs]
        torch.library.opcheck(forward, (*inputs, cu_seqlens, False))
        y, final_state, checkpoints = forward(*inputs, cu_seqlens, True)
        torch.library.opcheck(backward, (*inputs[:-1], cu_seqlens, checkpoints, y, final_state))

    @packed_or_plain
    def test_compiled_as_one_graph_it_gives_the_same_bits(self, operators, op, lengths):
        function, inputs, _ = self.operator_call(operators, op, lengths)
        expected = torch.autograd.grad(loss(function(*inputs)), inputs)
        compiled = torch.compile(lambda *x: loss(function(*x)), fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*inputs), inputs)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

    def test_other_boundaries_are_no_other_graph(self, operators, op):
        operator, backend, graphs = operators[op], self.backend(op), []
        *inputs, state = self.here(self.problem(operator, op, [30, 5, 5])).inputs

        def count(graph, _):
            graphs.append(graph)
            return graph

        compiled = torch.compile(
            lambda context: operator.run(*inputs, state, context, backend=backend),
            fullgraph=True,
            backend=count,
        )
        for lengths in ([30, 5, 5], [1, 0, 39], [13, 13, 14]):
            context = self.context(lengths)
            expected = operator.run(*inputs, state, context, backend=backend)
            assert all(torch.equal(x, y) for x, y in zip(compiled(context), expected, strict=True))
        assert len(graphs) == 1

    def test_autocast_changes_nothing(self, operators, op):
        function, inputs, _ = self.operator_call(operators, op, None)
        expected = function(*inputs)
        expected_gradients = torch.autograd.grad(loss(expected), inputs)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            found = function(*inputs)
            gradients = torch.autograd.grad(loss(found), inputs)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(gradients, expected_gradients, strict=True))


class EmulatedTable(KernelTable):
    """What only an emulation can show."""

    orders: ClassVar[tuple[dict[str, Any], ...]]
    """Options of the packed rows that are computed by blocks and threads in several orders."""

    def test_the_order_of_blocks_and_threads_changes_no_bit(self, operators, op, form):
        """Where it does, threads do not wait for each other where they should, or outputs are not added up in order."""
        set_order = self.kernels[op, form].load().rwkv_emulation_order
        for options in self.orders:
            problem, lengths = self.problem(operators[op], op, **options), options["lengths"]
            scale = torch.zeros(len(lengths), 1, 1, dtype=torch.float64)
            try:
                found = []
                for order in (0, 1, 2):
                    set_order(order)
                    found.append(self.results(operators[op], op, problem, lengths, form, scale))
            finally:
                set_order(0)
            for other in found[1:]:
                assert all(torch.equal(x, y) for x, y in zip(other, found[0], strict=True)), options
