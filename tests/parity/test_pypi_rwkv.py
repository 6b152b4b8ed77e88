"""Logits against the PyPI package ``rwkv``, an implementation we had no part in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv_train.config.model import LoraRanks, Rwkv4Config, Rwkv7Config

# A fair float32 tolerance between two correct implementations, absolute, on logits of standard deviation 2.
TOLERANCE = 5e-5
N_TOKENS = 40

MODELS = {
    "rwkv7": {
        "two-heads-of-64": Rwkv7Config(n_layer=3, n_embd=128, head_size=64, vocab_size=150),
        "one-layer-heads-of-16": Rwkv7Config(n_layer=1, n_embd=48, head_size=16, vocab_size=97),
        "heads-of-8-own-ranks": Rwkv7Config(
            n_layer=4, n_embd=72, head_size=8, vocab_size=61, lora_ranks=LoraRanks(w=5, a=6, v=7, g=90)
        ),
        "one-head": Rwkv7Config(n_layer=2, n_embd=32, head_size=32, vocab_size=40),
    },
    "rwkv4": {
        "three-layers": Rwkv4Config(n_layer=3, n_embd=128, vocab_size=150),
        "one-layer": Rwkv4Config(n_layer=1, n_embd=48, vocab_size=97),
        "odd-width": Rwkv4Config(n_layer=4, n_embd=37, vocab_size=61),
    },
}
CASES = [pytest.param(arch, name, id=f"{arch}-{name}") for arch, models in MODELS.items() for name in models]


def tokens_of(config):
    return torch.randint(0, config.vocab_size, (N_TOKENS,), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def package_logits(tmp_path_factory):
    """Logits of the package by architecture and model, computed by one process for each architecture."""
    results = {}

    def compute(arch, random_model):
        if arch not in results:
            root = tmp_path_factory.mktemp(arch)
            for name, config in MODELS[arch].items():
                folder = root / name
                folder.mkdir()
                torch.save(random_model(config).state_dict(), folder / "model.pth")
                torch.save(tokens_of(config), folder / "tokens.pt")
            script = Path(__file__).with_name("run_pypi_rwkv.py")
            command = [
                sys.executable,
                script,
                str(int(arch == "rwkv7")),
                *(root / name for name in MODELS[arch]),
            ]
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            assert done.returncode == 0, done.stderr
            results[arch] = {name: torch.load(root / name / "logits.pt") for name in MODELS[arch]}
        return results[arch]

    return compute


def read(model, tokens, cuts):
    state, rows = None, []
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        output = model(tokens[None, start:end], state)
        state = output.state
        rows.append(output.logits[0])
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("mode", "cuts"),
    [
        ("parallel", []),
        ("recurrent", list(range(1, N_TOKENS))),
        ("split", [1, N_TOKENS // 2]),
    ],
    ids=["parallel", "recurrent", "split"],
)
@pytest.mark.parametrize(("arch", "name"), CASES)
def test_logits_equal_those_of_the_package(random_model, package_logits, arch, name, mode, cuts):
    theirs = package_logits(arch, random_model)[name][mode]
    config = MODELS[arch][name]

    ours = read(random_model(config), tokens_of(config), cuts)

    assert 1.0 < theirs.std() < 4.0, "the tolerance is meant for logits of about this size"
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
