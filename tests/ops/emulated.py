"""The CUDA backends of the operators with CPU tensors: the kernels' own source, compiled for the CPU (cuda/emulation/).

What runs is the Python code that runs on a GPU, with another platform.
"""

import ctypes
import functools
import re
from contextlib import nullcontext
from pathlib import Path

from rwkv_train.assets import find_asset_folder
from rwkv_train.ops.build import build_library
from rwkv_train.ops.cuda import Platform
from rwkv_train.ops.cuda_build import find_source
from tests.ops.chunked_kernels import chunked_kernels
from tests.ops.exact_kernels import exact_kernels

# Without a GPU, fused products and sums are an instruction of the machine too; C++17, and not GNU's, fuses no others.
FLAGS = (
    "-std=c++17",
    "-O2",
    "-march=native",
    "-Wno-unknown-pragmas",
    "-DRWKV_EMULATED",
    "-fPIC",
    "-fvisibility=hidden",
    "-c",
    "-x c++",
)


@functools.cache
def load_emulated_library(op: str) -> ctypes.CDLL:
    """Compile the units of an operator, of which those that have not changed are kept, into one library."""
    source = find_source(op)
    emulation = sorted((find_asset_folder("cuda") / "emulation").glob("*.h"))
    first, *others = (
        build_library(
            f"{unit.stem}_emulated_unit", unit, included_by(unit, (*source.headers, *emulation)), flags=FLAGS
        )
        for unit in source.units
    )
    return ctypes.CDLL(str(build_library(f"{op}_emulated", first, flags=("-shared", *map(str, others)))))


def included_by(unit: Path, headers: tuple[Path, ...]) -> list[Path]:
    """Return those of the headers that a unit includes, or that these include."""
    by_name = {header.name: header for header in headers}
    found, left = set(), [unit]
    while left:
        included = re.findall(r'^#include ".*?([^/"]+)"', left.pop().read_text(), flags=re.MULTILINE)
        new = {by_name[name] for name in included} - found
        found |= new
        left += new
    return sorted(found)


EMULATED = Platform(
    dispatch_key="CPU",
    load_library=load_emulated_library,
    on_device=lambda device: nullcontext(),
    current_stream=lambda device: None,
)


KERNELS = exact_kernels(EMULATED, "emulated")
CHUNKED_KERNELS = chunked_kernels(EMULATED, "emulated_chunked")
