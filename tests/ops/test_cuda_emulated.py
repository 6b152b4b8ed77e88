"""The exact CUDA kernels over the emulation: the common table, and what only an emulation can show."""

import torch

from tests.ops.emulated import EMULATED, KERNELS
from tests.ops.exact_table import ExactTable, every_form, usual_size


class TestEmulated(ExactTable):
    platform = EMULATED
    kernels = KERNELS
    device = "cpu"

    @every_form
    def test_the_order_of_blocks_and_threads_changes_no_bit(self, operators, op, form):
        """Where it does, threads do not wait for each other where they should, or outputs are not added up in order."""
        operator, lengths = operators[op], [40, 0, 37]
        problem = operator.packed_problem(lengths, **usual_size(op))
        scale = torch.zeros(3, 1, 1, dtype=torch.float64)
        set_order = self.kernels[op, form].load().rwkv_emulation_order
        try:
            found = []
            for order in (0, 1, 2):
                set_order(order)
                found.append(self.results(operator, op, problem, lengths, form, scale))
        finally:
            set_order(0)
        for other in found[1:]:
            assert all(torch.equal(x, y) for x, y in zip(other, found[0], strict=True))
