"""``rwkv-train build-kernels``: compile the CUDA kernels ahead of time, also for another machine."""

import os
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from rwkv_train.errors import ConfigError

ALL = "all"

Architectures = Annotated[
    list[str] | None,
    typer.Option(
        "--arch",
        metavar="NAME",
        help="What to compile for: sm_80 (A100), sm_86, sm_89, sm_90 (H100), sm_100, sm_120 ..., compute_80 (PTX for "
        "any later chip), or all. May be repeated. By default the chips of this machine.",
    ),
]
Operators = Annotated[
    list[str] | None,
    typer.Option("--op", metavar="NAME", help="The operator: wkv7, say. May be repeated. By default all."),
]
CacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--cache-folder",
        "--output",
        metavar="FOLDER",
        help="Where the libraries go. By default $RWKV_TRAIN_KERNELS or ~/.cache/rwkv-train/kernels, where training "
        "looks for them.",
    ),
]
Anew = Annotated[bool, typer.Option("--anew", help="Build what is there already, too.")]


def build_kernels(
    arch: Architectures = None,
    op: Operators = None,
    cache_folder: CacheFolder = None,
    anew: Anew = False,
) -> None:
    """Compile the CUDA kernels now, so that no run has to wait for it or needs a compiler."""
    from concurrent.futures import ThreadPoolExecutor

    from rwkv_train.ops.cuda_build import ARCHITECTURES, build_cuda_library, cuda_operators
    from rwkv_train.ops.cuda_toolkit import find_toolkit

    known = cuda_operators()
    for name in op or ():
        if name not in known:
            raise ConfigError(
                f"--op {name}: there is no CUDA kernel of this name; choose from {', '.join(known)}"
            )
    if arch is not None and ALL in arch:
        if len(arch) > 1:
            raise ConfigError(f"--arch {ALL} stands alone; leave out the others, or it")
        arch = list(ARCHITECTURES)
    toolkit = find_toolkit()  # once, and before threads that would each complain

    cancel = threading.Event()

    def build(name: str) -> tuple[Path, float]:
        began = time.perf_counter()
        library = build_cuda_library(
            name, arch, cache_folder=cache_folder, toolkit=toolkit, anew=anew, cancel=cancel
        )
        return library, time.perf_counter() - began

    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        for library, seconds in pool.map(build, op or known):
            typer.echo(f"{library} ({seconds:.1f} s, {library.stat().st_size / 1e6:.1f} MB)")
    except BaseException:
        # Ctrl-C, SIGTERM, or one that failed. A pool's threads are waited for, at the latest when Python ends, so
        # they must end by themselves.
        cancel.set()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
