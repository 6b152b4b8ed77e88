"""Logits against the PyPI package ``rwkv``, an implementation we had no part in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv_train.config.model import LoraRanks, Rwkv4Config, Rwkv5Config, Rwkv6Config, Rwkv6Ranks, Rwkv7Config

# A fair float32 tolerance between two correct implementations, absolute, on logits of standard deviation 2.
TOLERANCE = 5e-5
N_TOKENS = 128
SPLIT = int(torch.randint(2, N_TOKENS - 1, (), generator=torch.Generator().manual_seed(11)))


def rwkv5_of_heads_of_8(version, bonus="time_faaaa"):
    return Rwkv5Config(
        n_layer=3, n_embd=72, head_size=8, vocab_size=61, ffn_width=90, version=version, bonus=bonus
    )


def rwkv5_models(version):
    return {
        "two-heads-of-64": Rwkv5Config(n_layer=3, n_embd=128, vocab_size=150, version=version),
        "one-layer-heads-of-16": Rwkv5Config(
            n_layer=1, n_embd=48, head_size=16, vocab_size=97, version=version
        ),
        "heads-of-8-own-ffn": rwkv5_of_heads_of_8(version),
    }


MODELS = {
    "rwkv4": {
        "three-layers": Rwkv4Config(n_layer=3, n_embd=128, vocab_size=150),
        "one-layer": Rwkv4Config(n_layer=1, n_embd=48, vocab_size=97),
        "odd-width": Rwkv4Config(n_layer=4, n_embd=37, vocab_size=61),
    },
    "rwkv5.0": rwkv5_models("5.0") | {"exponential-bonus": rwkv5_of_heads_of_8("5.0", "time_first")},
    "rwkv5.1": rwkv5_models("5.1") | {"exponential-bonus": rwkv5_of_heads_of_8("5.1", "time_first")},
    "rwkv5.2": rwkv5_models("5.2"),
    "rwkv6": {
        "two-heads-of-64": Rwkv6Config(n_layer=3, n_embd=128, vocab_size=150),
        "one-layer-heads-of-16": Rwkv6Config(n_layer=1, n_embd=48, head_size=16, vocab_size=97),
        "heads-of-8-own-ranks": Rwkv6Config(
            n_layer=3,
            n_embd=72,
            head_size=8,
            vocab_size=61,
            ffn_width=90,
            lora_ranks=Rwkv6Ranks(shift=5, decay=7),
        ),
    },
    "rwkv7": {
        "two-heads-of-64": Rwkv7Config(n_layer=3, n_embd=128, head_size=64, vocab_size=150),
        "one-layer-heads-of-16": Rwkv7Config(n_layer=1, n_embd=48, head_size=16, vocab_size=97),
        "heads-of-8-own-ranks": Rwkv7Config(
            n_layer=4, n_embd=72, head_size=8, vocab_size=61, lora_ranks=LoraRanks(w=5, a=6, v=7, g=90)
        ),
        "one-head": Rwkv7Config(n_layer=2, n_embd=32, head_size=32, vocab_size=40),
    },
}
CASES = [
    pytest.param(version, name, id=f"{version}-{name}")
    for version, models in MODELS.items()
    for name in models
]


def with_norms_first(tensors):
    """The package tells 5.2 from 5.1 by the order of names where there is one layer: it must see ``ln_x`` first."""
    return dict(sorted(tensors.items(), key=lambda item: ".ln_x." not in item[0]))


def tokens_of(config):
    return torch.randint(0, config.vocab_size, (N_TOKENS,), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def package_logits(tmp_path_factory):
    """Logits of the package by version and model, computed by one process for RWKV-7 and one for the older."""
    results = {}

    def compute(version, random_model):
        if version not in results:
            root = tmp_path_factory.mktemp("models")
            versions = ["rwkv7"] if version == "rwkv7" else [other for other in MODELS if other != "rwkv7"]
            folders = {
                (other, name): root / f"{other}-{name}" for other in versions for name in MODELS[other]
            }
            for (other, name), folder in folders.items():
                config = MODELS[other][name]
                folder.mkdir()
                torch.save(with_norms_first(random_model(config).state_dict()), folder / "model.pth")
                torch.save(tokens_of(config), folder / "tokens.pt")
            script = Path(__file__).with_name("run_pypi_rwkv.py")
            is_7 = str(int(version == "rwkv7"))
            done = subprocess.run(
                [sys.executable, script, is_7, str(SPLIT), *folders.values()],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            assert done.returncode == 0, done.stderr
            for (other, name), folder in folders.items():
                results.setdefault(other, {})[name] = torch.load(folder / "logits.pt")
        return results[version]

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
    [("parallel", []), ("recurrent", list(range(1, N_TOKENS))), ("split", [1, SPLIT])],
    ids=["parallel", "recurrent", "split"],
)
@pytest.mark.parametrize(("version", "name"), CASES)
def test_logits_equal_those_of_the_package(random_model, package_logits, version, name, mode, cuts):
    theirs = package_logits(version, random_model)[name][mode]
    config = MODELS[version][name]

    ours = read(random_model(config), tokens_of(config), cuts)

    assert 1.0 < theirs.std() < 4.0, "the tolerance is meant for logits of about this size"
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
