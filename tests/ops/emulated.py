"""The CUDA backends of the operators with CPU tensors: the kernels' own source, compiled for the CPU (cuda/emulation/).

What runs is the Python code that runs on a GPU, with another platform.
"""

import ctypes
import functools
from contextlib import nullcontext

from rwkv_train.assets import find_asset_folder
from rwkv_train.ops.build import build_library
from rwkv_train.ops.cuda import Platform
from tests.ops.exact_kernels import exact_kernels

# Without a GPU, fused products and sums are an instruction of the machine too; C++17, and not GNU's, fuses no others.
FLAGS = (
    "-std=c++17",
    "-O2",
    "-march=native",
    "-Wno-unknown-pragmas",
    "-DRWKV_EMULATED",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-x c++",
)


@functools.cache
def load_emulated_library(op: str) -> ctypes.CDLL:
    folder = find_asset_folder("cuda")
    headers = [x for part in (op, "common", "emulation") for x in sorted((folder / part).glob("*.*h"))]
    return ctypes.CDLL(str(build_library(f"{op}_emulated", folder / op / f"{op}.cu", headers, flags=FLAGS)))


EMULATED = Platform(
    backend="emulated",
    dispatch_key="CPU",
    load_library=load_emulated_library,
    on_device=lambda device: nullcontext(),
    current_stream=lambda device: None,
)


KERNELS = exact_kernels(EMULATED)
