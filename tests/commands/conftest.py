import os
import signal
import sys

import pytest
import torch

from rwkv_train.checkpoints import Weights, write_weights
from rwkv_train.commands import main
from rwkv_train.config.model import LoraRanks, Rwkv7Config
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.tokenizers import load_tokenizer

CONFIG = Rwkv7Config(
    n_layer=1, n_embd=32, head_size=16, vocab_size=257, lora_ranks=LoraRanks(w=8, a=8, v=8, g=8)
)


@pytest.fixture(scope="session")
def weights():
    """A small RWKV-7 of random weights that names the byte tokenizer and never ends a document."""
    model = build_model(CONFIG, wkv_backend="reference")
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.ln_out.bias[0] = 10
        model.head.weight[0, 0] = -10
    return Weights(CONFIG, model.state_dict(), load_tokenizer("bytes").identity, step=3)


@pytest.fixture(scope="session")
def checkpoint(weights, tmp_path_factory):
    """The path of a safetensors folder."""
    return str(write_weights(tmp_path_factory.mktemp("checkpoint") / "model", weights, "safetensors"))


@pytest.fixture
def call_main(monkeypatch, capsys):
    """Run a command line in this process, as a new one takes seconds; return exit code, stdout and stderr."""
    # What main sets for the whole process is put back.
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    for name, value in (("GOMP_SPINCOUNT", "20000"), ("TORCH_CPP_LOG_LEVEL", "ERROR")):
        monkeypatch.setenv(name, os.environ.get(name, value))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rwkv-train", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run
