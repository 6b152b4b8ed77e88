"""rwkv-train: pretrain, evaluate, convert and run RWKV language models.

The names in ``__all__`` are loaded when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_train.checkpoints import load_model
    from rwkv_train.generation.generate import generate
    from rwkv_train.tokenizers import load_tokenizer
    from rwkv_train.training.run import run_pretraining
    from rwkv_train.training.settings import load_settings

__version__ = "0.1.0"

__all__ = ["generate", "load_model", "load_settings", "load_tokenizer", "run_pretraining"]

_HOMES = {
    "generate": "rwkv_train.generation.generate",
    "load_model": "rwkv_train.checkpoints",
    "load_settings": "rwkv_train.training.settings",
    "load_tokenizer": "rwkv_train.tokenizers",
    "run_pretraining": "rwkv_train.training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rwkv_train' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
