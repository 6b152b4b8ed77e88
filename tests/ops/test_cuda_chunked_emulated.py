"""The CUDA kernels on tensor cores over the emulation: their common table, and what only an emulation can show."""

from tests.ops.chunked_table import ChunkedTable
from tests.ops.emulated import CHUNKED_KERNELS, EMULATED
from tests.ops.kernel_table import EmulatedTable


class TestChunked(ChunkedTable, EmulatedTable):
    platform = EMULATED
    kernels = CHUNKED_KERNELS
    device = "cpu"
    orders = ({"lengths": [130, 0, 37]}, {"lengths": [70, 0, 17], "head_size": 128})
