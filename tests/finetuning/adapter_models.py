"""Small models of every version, with and without a trained adapter."""

from typing import NamedTuple

import torch

from rwkv_train.checkpoints import AdapterNote, fingerprint
from rwkv_train.config.load import check_model
from rwkv_train.config.methods import LoraMethod
from rwkv_train.finetuning.adapter_files import write_adapter
from rwkv_train.finetuning.adapters import inject_adapter, own_parameters
from rwkv_train.models.registry import build_model, initialize
from rwkv_train.tokenizers import load_tokenizer

VOCAB_SIZE = 257
SIZES = {"n_layer": 2, "n_embd": 32, "vocab_size": VOCAB_SIZE, "ctx_len": 16}
MODELS = {
    "rwkv4": {},
    "rwkv5": {"head_size": 8},
    "rwkv6": {"head_size": 8, "lora_ranks": {"shift": 4, "decay": 6}},
    "rwkv7": {"head_size": 8, "lora_ranks": {"w": 8, "a": 8, "v": 8, "g": 8}},
}
VARIANTS = {
    "lora": {},
    "by-layer": {"rank_pattern": {"*.key": 3}, "alpha_pattern": {"*.0.*": 7.5}},
    "rslora": {"rslora": True},
    "dora": {"variant": "dora"},
    "pissa": {"variant": "pissa"},
    "pissa-rslora-by-layer": {
        "variant": "pissa",
        "rslora": True,
        "rank_pattern": {"*.key": 3},
        "alpha_pattern": {"*.0.*": 7.5},
    },
    "miss": {"variant": "miss"},
    "miss-uneven": {"variant": "miss", "rank": 5},
}
TOKENS = torch.randint(VOCAB_SIZE, (2, 8), generator=torch.Generator().manual_seed(3))


def method_of(**settings):
    return LoraMethod(**{"method": "lora", "rank": 4, **settings})


def base_model(arch="rwkv7", seed=0, **sizes):
    """A model of random numbers: published initial values have matrices that are zero."""
    model = build_model(
        check_model({"arch": arch, **SIZES, **MODELS[arch], **sizes}), wkv_backend="reference"
    )
    initialize(model, seed)
    disturb(model.parameters(), seed + 1, 0.1)
    return model.eval()


def disturb(parameters, seed, size):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


class Trained(NamedTuple):
    model: torch.nn.Module
    base: dict
    own: dict
    method: LoraMethod


def trained(arch="rwkv7", seed=5, **settings):
    """A model whose adapter is no longer what it was at the start."""
    model, method = base_model(arch), method_of(**settings)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject_adapter(model, method, seed)
    disturb((p for p in model.parameters() if p.requires_grad), 7, 0.05)
    own = {name: parameter.detach().clone() for name, parameter in own_parameters(model)}
    return Trained(model, base, own, method)


def write(folder, found, **changes):
    note = AdapterNote(
        fingerprint(found.base), found.model.config, load_tokenizer("bytes").identity, template="g1", step=3
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, found.own, found.method, note._replace(**changes))
    return folder


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits
