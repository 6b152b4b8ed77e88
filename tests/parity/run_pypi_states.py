"""Read tokens with the PyPI package ``rwkv`` from official files of a state; a program of its own.

Usage: ``python run_pypi_states.py RWKV_V7_ON FOLDER...`` with ``model.pth``, ``state.pth`` and ``tokens.pt`` in each
folder; writes ``logits.pt`` there: those of every position, and those of the last one read token by token.
"""

import os
import sys
from pathlib import Path

os.environ["RWKV_V7_ON"] = sys.argv[1]
os.environ["RWKV_JIT_ON"] = "1"
os.environ["RWKV_CUDA_ON"] = "0"

import torch
from rwkv.model import RWKV

is_7 = sys.argv[1] == "1"

for folder in map(Path, sys.argv[2:]):
    official = torch.load(folder / "state.pth")
    if not is_7:  # the package reads the state of RWKV-5 and 6 itself where it stands among the weights
        weights = torch.load(folder / "model.pth")
        torch.save(weights | official, folder / "model.pth")
    model = RWKV(model=str(folder / "model"), strategy="cpu fp32")

    def start(model=model, official=official):
        if not is_7:
            return None
        state = model.generate_zero_state()
        for layer in range(len(state) // 3):
            state[3 * layer + 1] = official[f"blocks.{layer}.att.time_state"].clone()
        return state

    tokens = torch.load(folder / "tokens.pt").tolist()
    parallel, _ = model.forward(tokens, start(), full_output=True)
    state = start()
    for token in tokens:
        last, state = model.forward([token], state)
    torch.save({"parallel": parallel, "last": last}, folder / "logits.pt")
