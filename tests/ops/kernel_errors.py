"""``python -m tests.ops.kernel_errors``: the errors of the CUDA kernels against float64, as a table.

Inputs are bfloat16, but for log decay and states; expected values are those of the float64 loop on the same inputs.
Without a GPU the kernels' own source runs over the emulation, whose products are exact and whose sums are float32's:
what a chip adds in its own way differs by far less than what is rounded to bfloat16.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_train.benchmarks.environment import describe_environment
from rwkv_train.ops.context import PLAIN
from tests.ops.chunked_cases import CASES, make_problem
from tests.ops.conftest import OPERATORS, Problem
from tests.ops.exact_kernels import SIGNATURES, CudaKernel
from tests.ops.test_packed import relative_error, results

logger = logging.getLogger("tests.ops.kernel_errors")

PRECISIONS = {
    "cuda": "_chunked_whole",
    "cuda, segments of 64 tokens": "_chunked_segments",
    "cuda_bf16": "_chunked_bf16",
    "cuda_exact": "",
}
"""What computes, by the names of the backends -> the form of the kernels."""
SENSITIVITY = "float64, inputs rounded once more"
"""No kernel: the float64 loop, every bfloat16 input off by a random part of what rounding it takes away."""
STRONG_DECAY = -2.718
"""Of channels whose gradient by ``log(-w)`` is looked at alone: among those of slow channels it would not be seen."""

Kernels = Mapping[tuple[str, str], CudaKernel]
Row = dict[str, Any]


def measure(op: str, name: str, n_tokens: int, n_head: int, kernels: Kernels, device: str) -> Iterator[Row]:
    """Yield a row for each precision of an operator in one of its cases.

    Args:
        op: ``"wkv5"``, ``"wkv6"`` or ``"wkv7"``.
        name: of the case, see ``chunked_cases.py``.
        n_tokens: tokens of the one sequence.
        n_head: number of its heads, of 64 channels.
        kernels: by operator and form; of a form that is missing there is no row.
        device: where they run.
    """
    operator, problem = OPERATORS[op], make_problem(op, CASES[op][name], n_tokens, n_head=n_head)

    def reference(given: Problem) -> list[Tensor]:
        return results(op, operator.run, given, PLAIN, "reference", torch.float64)

    expected = reference(problem)

    def row(precision: str, found: list[Tensor]) -> Row:
        size = {"T": n_tokens, "H": n_head, "N": problem.inputs[0].shape[-1]}
        errors = errors_by_name(op, problem, [x.cpu() for x in found], expected)
        logger.info("%s, %s, %s: %s", op, name, precision, errors)
        return {"op": op, "case": name, "precision": precision, **size, "errors": errors}

    for precision, form in PRECISIONS.items():
        if kernel := kernels.get((op, form)):
            here = Problem(
                tuple(x.to(device) for x in problem.inputs), problem.dy.to(device), problem.d_final.to(device)
            )
            yield row(precision, results(op, _caller(kernel), here, None, "", None))
    yield row(SENSITIVITY, reference(perturbed(problem)))


def errors_by_name(
    op: str, problem: Problem, found: list[Tensor], expected: list[Tensor]
) -> dict[str, float | None]:
    """Return the relative error of the norm of each output and gradient; None for one that is not finite."""
    inputs = SIGNATURES[op].inputs
    pairs = dict(
        zip(("y", "final", *(f"d{name}" for name in inputs)), zip(found, expected, strict=True), strict=True)
    )
    if op != "wkv7":
        w = problem.inputs[inputs.index("w")]
        if (strong := w < STRONG_DECAY).any():
            pairs["w dw, strong w"] = tuple((w * x)[strong] for x in pairs["dw"])
    return {
        name: float(f"{relative_error(x, y):.3g}") if x.isfinite().all() else None
        for name, (x, y) in pairs.items()
    }


def perturbed(problem: Problem) -> Problem:
    """Return a problem in float64, each bfloat16 number moved within half of its distance to the next one."""
    generator = torch.Generator().manual_seed(1)

    def moved(x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16:
            return x.double()
        mantissa, exponent = torch.frexp(x.double())
        step = torch.ldexp(torch.ones_like(mantissa), exponent - 8)
        part = torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.5
        return x.double() + step * part

    return Problem(tuple(moved(x) for x in problem.inputs), moved(problem.dy), problem.d_final.double())


def _caller(kernel: CudaKernel) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(*given: Any, backend: str) -> tuple[Tensor, Tensor]:
        *inputs, _context = given
        return kernel.row.run(*inputs, None)

    return run


def as_markdown(rows: list[Row]) -> str:
    """Return a table for each operator, errors in units of 1e-3."""
    lines: list[str] = []
    for op in dict.fromkeys(row["op"] for row in rows):
        ours = [row for row in rows if row["op"] == op]
        columns = list(dict.fromkeys(name for row in ours for name in row["errors"]))
        lines += ["", f"| `{op}` | precision | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
        for row in ours:
            errors = (_shown(row["errors"].get(name, "")) for name in columns)
            lines.append(f"| {row['case']} | {row['precision']} | {' | '.join(errors)} |")
    return "\n".join(lines[1:])


def _shown(error: float | str | None) -> str:
    if isinstance(error, float):
        return f"{1e3 * error:.1f}"
    return "not finite" if error is None else error


def find_kernels(device: str) -> Kernels:
    """Return all forms of the kernels of a GPU, or of the emulation."""
    if device == "cpu":
        from tests.ops.emulated import CHUNKED_KERNELS, KERNELS

        return {**KERNELS, **CHUNKED_KERNELS}
    from rwkv_train.ops.cuda import CUDA
    from tests.ops.chunked_kernels import chunked_kernels
    from tests.ops.exact_kernels import exact_kernels

    return {**exact_kernels(CUDA, "cuda_exact"), **chunked_kernels(CUDA, "cuda")}


def main() -> None:
    """Measure what the command line names; print the tables, and write the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m tests.ops.kernel_errors", description=__doc__)
    parser.add_argument("--op", action="append", choices=list(CASES), help="may be repeated (all)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the sequence (1024)")
    parser.add_argument("--heads", type=int, default=2, help="its heads, of 64 channels (2)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cpu: the emulation (cpu)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)  # products of 64 x 64: threads would only wait for each other
    kernels = find_kernels(given.device)
    rows = [
        row
        for op in given.op or CASES
        for name in CASES[op]
        for row in measure(op, name, given.tokens, given.heads, kernels, given.device)
    ]
    sys.stdout.write(as_markdown(rows) + "\n")
    if given.json:
        command = f"python -m tests.ops.kernel_errors --device {given.device} --json {given.json}"
        if given.tokens != parser.get_default("tokens") or given.heads != parser.get_default("heads"):
            command += f" --tokens {given.tokens} --heads {given.heads}"
        environment = {**describe_environment(torch.device(given.device)), "command": command}
        content = {"environment": environment, "results": rows}
        given.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
