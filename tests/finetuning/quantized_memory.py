"""``python -m tests.finetuning.quantized_memory``: memory and speed of LoRA steps over a quantized base, as a table.

Each kind of base is loaded and trained in processes of its own, in turn, from one file of bfloat16 weights. ``none`` is
read into a float32 model as a run does; ``int8`` and ``nf4`` are quantized as they are read.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file

from rwkv_train.benchmarks.environment import describe_environment
from rwkv_train.checkpoints.weights import read_weights
from rwkv_train.config.model import Rwkv7Config
from rwkv_train.finetuning.quantized import load_quantized, require_bitsandbytes
from rwkv_train.models.registry import build_model, initialize

logger = logging.getLogger("tests.finetuning.quantized_memory")

KINDS = ("none", "int8", "nf4")
TARGETS = r"blocks\.\d+\.(att|ffn)\.(receptance|key|value|output)"
MIB = 2**20
STEPS = 4
"""Of one process; the first is not timed."""


def measure(kind: str, path: Path, ctx_len: int) -> dict[str, Any]:
    """Load a base, train an adapter of rank 16 over it, and return what that took; asked of a fresh process."""
    require_bitsandbytes()  # peft imports it anyhow, so every kind is measured with it
    imports_rss = _peak_rss()
    weights = read_weights(path)
    began = time.perf_counter()
    if kind == "none":
        model = build_model(weights.config)
        model.load_state_dict(weights.tensors)
    else:
        model = build_model(weights.config, device="meta")
        load_quantized(model, weights.tensors, kind, "cpu")
    load_seconds = time.perf_counter() - began
    kept = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    loading_rss, vocab_size = _peak_rss(), weights.config.vocab_size
    del weights  # and the file is no longer mapped
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    model.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=16, target_modules=TARGETS), model)
    model.recompute_blocks = True
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tokens = torch.randint(vocab_size, (1, ctx_len + 1), generator=torch.Generator().manual_seed(0))
    walls, cpus, losses = [], [], []
    for _ in range(STEPS):
        wall, cpu = time.perf_counter(), time.process_time()
        loss = model(tokens[:, :-1], targets=tokens[:, 1:]).losses.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {
        "weights_mib": kept / MIB,
        "imports_rss_mib": imports_rss,
        "loading_rss_mib": loading_rss,
        "training_rss_mib": _peak_rss(),
        "load_seconds": load_seconds,
        "step_seconds": statistics.median(walls[1:]),
        "step_cpu_seconds": statistics.median(cpus[1:]),
        "tokens_per_second": ctx_len / statistics.median(walls[1:]),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def _peak_rss() -> float:
    # Not getrusage: what it tells of a new process begins with the memory of its parent.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024  # of KiB


def write_base(path: Path, config: Rwkv7Config) -> None:
    """Write a model whose layers are all at work: initial values leave many of them zero."""
    model = build_model(config)
    initialize(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: (value + 0.02 * torch.randn(value.shape, generator=generator)).bfloat16()
        for name, value in model.state_dict().items()
    }
    save_file(tensors, path)


def as_markdown(rows: list[dict[str, Any]]) -> str:
    names = [name for name in rows[0] if isinstance(rows[0][name], float)]
    lines = ["| base | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {row['base']} | " + " | ".join(f"{row[name]:.4g}" for name in names) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Measure every kind in turn; print the table, and write the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m tests.finetuning.quantized_memory")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model (12)")
    parser.add_argument("--width", type=int, default=768, help="its width (768)")
    parser.add_argument("--vocab", type=int, default=1024, help="its vocabulary (1024)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a step (256)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="processes for each kind; the median counts (3)"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--only", nargs=2, metavar=("KIND", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        sys.stdout.write(json.dumps(measure(given.only[0], Path(given.only[1]), given.tokens)))
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    load_before = os.getloadavg()[0]
    config = Rwkv7Config(
        n_layer=given.layers, n_embd=given.width, vocab_size=given.vocab, ctx_len=given.tokens
    )
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "base.safetensors")
        write_base(path, config)
        for _ in range(given.repeats):
            for kind in KINDS:  # in turn, so that a machine that slows down slows all of them
                command = [
                    sys.executable,
                    "-m",
                    "tests.finetuning.quantized_memory",
                    "--only",
                    kind,
                    str(path),
                ]
                done = subprocess.run(
                    [*command, "--tokens", str(given.tokens)], stdout=subprocess.PIPE, text=True, check=True
                )
                found[kind].append(json.loads(done.stdout))
                logger.info("%s: %s", kind, found[kind][-1])
    sizes = {"arch": config.arch, "L": config.n_layer, "C": config.n_embd, "V": config.vocab_size}
    rows = [
        {
            "base": kind,
            **sizes,
            "T": given.tokens,
            **{name: statistics.median(each[name] for each in found[kind]) for name in found[kind][0]},
        }
        for kind in KINDS
    ]
    sys.stdout.write(as_markdown(rows) + "\n")
    if given.json:
        environment = {
            **describe_environment(torch.device("cpu")),
            "command": " ".join(["python -m tests.finetuning.quantized_memory", *sys.argv[1:]]),
            "load_before": load_before,
            "bitsandbytes": version("bitsandbytes"),
            "peft": version("peft"),
        }
        content = {"environment": environment, "results": rows}
        given.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
