"""The exact CUDA kernels over the emulation: the common table, and what only an emulation can show."""

from tests.ops.emulated import EMULATED, KERNELS
from tests.ops.exact_table import ExactTable
from tests.ops.kernel_table import EmulatedTable


class TestEmulated(ExactTable, EmulatedTable):
    platform = EMULATED
    kernels = KERNELS
    device = "cpu"
    orders = ({"lengths": [270, 0, 37]},)  # over two of the tiles of 128 tokens that a block of wkv4 takes
