"""Run the PyPI package ``rwkv`` on saved models and write its logits; a program of its own.

The package chooses its classes by environment variables when it is imported, so each version needs its own
process. Usage: ``python run_pypi_rwkv.py MODE_ENV SPLIT FOLDER...`` with ``model.pth`` and ``tokens.pt`` in each
folder; writes ``logits.pt`` there: the logits of every position, read in three ways.
"""

import os
import sys
from pathlib import Path

os.environ["RWKV_V7_ON"] = sys.argv[1]
os.environ["RWKV_JIT_ON"] = "1"
os.environ["RWKV_CUDA_ON"] = "0"

import torch
from rwkv.model import RWKV


def read(model: RWKV, tokens: list[int], lengths: list[int]) -> torch.Tensor:
    state, rows = None, []
    for start, end in zip([0, *lengths], [*lengths, len(tokens)], strict=True):
        logits, state = model.forward(tokens[start:end], state, full_output=True)
        rows.append(logits.reshape(end - start, -1))
    return torch.cat(rows)


for folder in map(Path, sys.argv[3:]):
    model = RWKV(model=str(folder / "model"), strategy="cpu fp32")
    tokens = torch.load(folder / "tokens.pt").tolist()
    torch.save(
        {
            "parallel": read(model, tokens, []),
            "recurrent": read(model, tokens, list(range(1, len(tokens)))),
            "split": read(model, tokens, [1, int(sys.argv[2])]),
        },
        folder / "logits.pt",
    )
