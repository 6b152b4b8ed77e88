"""The CUDA kernels on a GPU: their common tables, streams, devices, graphs, and that nothing is waited for."""

import pytest
import torch

from rwkv_train.ops.backends import AUTO, problem_of
from rwkv_train.ops.chip import capability_of
from rwkv_train.ops.context import PLAIN, packed_context
from rwkv_train.ops.cuda import CUDA
from rwkv_train.ops.prepare import prepare_backend
from tests.ops.chunked_kernels import chunked_kernels
from tests.ops.chunked_table import ChunkedTable
from tests.ops.exact_kernels import exact_kernels
from tests.ops.exact_table import ExactTable
from tests.ops.kernel_table import KernelTable, loss
from tests.ops.test_packed import boundaries

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LONG_SLEEP_CYCLES = 500_000_000
"""A quarter of a second and more: what another stream would have done long before."""


class CudaTable(KernelTable):
    """What only a GPU can show."""

    platform = CUDA
    device = "cuda"

    def call_of(self, operators, op, form, lengths):
        """Return (function without arguments: outputs and gradients, its inputs, its boundaries)."""
        operator = operators[op]
        problem = self.here(self.problem(operator, op, lengths))
        leaves = [x.requires_grad_() for x in problem.inputs]
        context, backend = self.context(lengths), self.backend(op, form)
        d_final = torch.ones_like(leaves[-1])

        def call():
            outputs = operator.run(*leaves, context, backend=backend)
            return (*outputs, *torch.autograd.grad(outputs, leaves, (problem.dy, d_final)))

        return call, leaves, context.cu_seqlens

    @pytest.mark.parametrize("lengths", [None, [20, 0, 1, 34]], ids=["plain", "packed"])
    def test_nothing_is_waited_for(self, operators, op, form, lengths):
        call, _, _ = self.call_of(operators, op, form, lengths)
        call()  # the first one loads the kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_it_runs_on_the_current_stream(self, operators, op, form):
        call, leaves, _ = self.call_of(operators, op, form, None)
        expected = call()
        values = [x.detach().clone() for x in leaves]
        with torch.no_grad():
            for x in leaves:
                x.fill_(-0.5)  # what it would read on another stream
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LONG_SLEEP_CYCLES)
            with torch.no_grad():
                for x, value in zip(leaves, values, strict=True):
                    x.copy_(value)
            found = call()
        stream.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

    @pytest.mark.parametrize("lengths", [None, [30, 5, 0, 5]], ids=["plain", "packed"])
    def test_a_cuda_graph_replays_it_with_other_values_and_boundaries(self, operators, op, form, lengths):
        call, leaves, cu_seqlens = self.call_of(operators, op, form, lengths)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # as PyTorch wants it before a capture
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()

        for other in ([30, 5, 0, 5], [1, 0, 0, 39], [10, 10, 10, 10]):
            with torch.no_grad():
                leaves[2].mul_(0.9)
                if cu_seqlens is not None:
                    cu_seqlens.copy_(boundaries(other))
            expected = [x.clone() for x in call()]
            graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

    def test_a_cuda_graph_replays_decoding(self, operators, op):
        operator, backend = operators[op], self.backend(op)
        problem = self.here(self.problem(operator, op, n_tokens=6))
        *inputs, state = problem.inputs
        by_token = [x.shape == problem.dy.shape for x in inputs]
        token = [x[:, :1].clone() if cut else x for x, cut in zip(inputs, by_token, strict=True)]
        now = state.clone()

        def step():
            y, after = operator.run(*token, now, PLAIN, backend=backend)
            now.copy_(after)
            return y

        with torch.no_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = step()
            now.copy_(state)
            outputs = []
            for t in range(6):
                for one, whole, cut in zip(token, inputs, by_token, strict=True):
                    if cut:
                        one.copy_(whole[:, t : t + 1])
                graph.replay()
                outputs.append(y.clone())
        expected, final = operator.run(*inputs, state, PLAIN, backend=backend)
        self.assert_alike(op, None, (torch.cat(outputs, dim=1), now), (expected, final))

    def test_compiled_by_inductor_it_gives_the_same(self, operators, op):
        function, inputs, _ = self.operator_call(operators, op, [20, 0, 1, 34])
        expected = torch.autograd.grad(loss(function(*inputs)), inputs)
        compiled = torch.compile(lambda *x: loss(function(*x)), fullgraph=True)
        found = torch.autograd.grad(compiled(*inputs), inputs)
        self.assert_alike(op, None, found, expected)

    @pytest.mark.multigpu
    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_it_runs_where_the_tensors_are_and_not_on_the_current_device(self, operators, op, form):
        operator = operators[op]
        problem = self.problem(operator, op, [20, 0, 33])
        found = []
        for device in ("cuda:0", "cuda:1"):
            leaves = [x.to(device).requires_grad_() for x in problem.inputs]
            context = packed_context(boundaries([20, 0, 33]).to(device))
            with torch.cuda.stream(torch.cuda.Stream(device)), torch.cuda.device(0):
                outputs = operator.run(*leaves, context, backend=self.backend(op, form))
                assert torch.cuda.current_device() == 0
                grad_outputs = (problem.dy.to(device), torch.ones_like(leaves[-1]))
                gradients = torch.autograd.grad(outputs, leaves, grad_outputs)
            torch.cuda.synchronize(device)
            assert all(x.device == torch.device(device) for x in (*outputs, *gradients))
            found.append([x.cpu() for x in (*outputs, *gradients)])
        self.assert_alike(op, form, *found)  # the two may be of different kinds

    @pytest.mark.slow
    def test_more_than_2_to_the_31_numbers_are_found(self, operators, op):
        """The last row of a batch in which it starts beyond that gets the bits that it gets alone."""
        n_rows, n_tokens, width = 1025, 512, 4096
        bytes_needed = n_rows * n_tokens * width * (6 if op == "wkv4" else 16) + (4 << 30)
        if torch.cuda.mem_get_info()[0] < bytes_needed:
            pytest.skip(f"needs {bytes_needed >> 30} GB of free GPU memory")
        operator = operators[op]
        size = {"n_embd": width} if op == "wkv4" else {"n_head": 64, "head_size": 64}
        problem = self.here(operator.problem(batch=1, n_tokens=n_tokens, **size))
        one = [x if i in operator.full_precision else x.bfloat16() for i, x in enumerate(problem.inputs)]
        alone = operator.run(*one, PLAIN, backend=self.backend(op))
        rows = [
            x if i in operator.shared else x.expand(n_rows, *x.shape[1:]).contiguous()
            for i, x in enumerate(one)
        ]
        y, final_state = operator.run(*rows, PLAIN, backend=self.backend(op))
        assert y.numel() > 1 << 31
        assert torch.equal(y[-1:], alone[0])
        assert torch.equal(final_state[-1:], alone[1])


class TestExact(ExactTable, CudaTable):
    kernels = exact_kernels(CUDA, "cuda_exact")

    def test_auto_takes_it(self, operators, op):
        v = operators[op].problem().inputs[3].to("cuda", torch.bfloat16)
        problem = problem_of(v, None if op == "wkv4" else v.shape[-1], is_packed=False)
        assert problem.capability == capability_of(v.device) is not None
        assert prepare_backend(op, problem, AUTO).name == "cuda_exact"


class TestChunked(ChunkedTable, CudaTable):
    kernels = chunked_kernels(CUDA, "cuda")
