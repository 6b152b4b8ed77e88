"""Random weights under the published names, and a file system that dies at a chosen moment."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rwkv_train.checkpoints import TrainingState, save_training_checkpoint, writing
from rwkv_train.checkpoints.safetensors_file import SafetensorsWriter
from rwkv_train.config.model import (
    LoraRanks,
    ModelConfig,
    Rwkv4Config,
    Rwkv5Config,
    Rwkv6Config,
    Rwkv6Ranks,
    Rwkv7Config,
)
from rwkv_train.config.save import to_tree

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def _common_shapes(vocab_size: int, n_embd: int, n_layer: int) -> Shapes:
    V, C, L = vocab_size, n_embd, n_layer
    norms = ["blocks.0.ln0", *(f"blocks.{i}.{ln}" for i in range(L) for ln in ("ln1", "ln2")), "ln_out"]
    matrices = {"emb.weight": (V, C), "head.weight": (V, C)}
    return matrices | {f"{norm}.{part}": (C,) for norm in norms for part in ("weight", "bias")}


def _rwkv4_shapes(vocab_size: int, n_embd: int, n_layer: int) -> Shapes:
    """The names and shapes of RWKV-LM's v4neo, written down apart from our models."""
    V, C, L = vocab_size, n_embd, n_layer
    block: Shapes = {
        "att.time_decay": (C,),
        "att.time_first": (C,),
        "att.time_mix_k": (1, 1, C),
        "att.time_mix_v": (1, 1, C),
        "att.time_mix_r": (1, 1, C),
        "att.key.weight": (C, C),
        "att.value.weight": (C, C),
        "att.receptance.weight": (C, C),
        "att.output.weight": (C, C),
        "ffn.time_mix_k": (1, 1, C),
        "ffn.time_mix_r": (1, 1, C),
        "ffn.key.weight": (4 * C, C),
        "ffn.receptance.weight": (C, C),
        "ffn.value.weight": (C, 4 * C),
    }
    return _common_shapes(V, C, L) | {
        f"blocks.{i}.{name}": shape for i in range(L) for name, shape in block.items()
    }


def _rwkv5_shapes(
    vocab_size: int, n_embd: int, n_layer: int, head_size: int, ffn_width: int, version: str, bonus: str
) -> Shapes:
    """The names and shapes of RWKV-LM's x052 and of the two before it, written down apart from our models."""
    V, C, L, N, F = vocab_size, n_embd, n_layer, head_size, ffn_width
    of_decay = (C // N, N) if version == "5.2" else (C // N,)
    gated = version != "5.0"
    block: Shapes = {f"att.time_mix_{name}": (1, 1, C) for name in ("kvrg" if gated else "kvr")}
    block |= {"att.time_decay": of_decay, f"att.{bonus}": of_decay}
    block |= {f"att.{name}.weight": (C, C) for name in ("receptance", "key", "value", "output")}
    block |= {"att.gate.weight": (C, C)} if gated else {}
    block |= {"att.ln_x.weight": (C,), "att.ln_x.bias": (C,)}
    block |= {"ffn.time_mix_k": (1, 1, C), "ffn.time_mix_r": (1, 1, C)}
    block |= {"ffn.key.weight": (F, C), "ffn.receptance.weight": (C, C), "ffn.value.weight": (C, F)}
    return _common_shapes(V, C, L) | {
        f"blocks.{i}.{name}": shape for i in range(L) for name, shape in block.items()
    }


def _rwkv6_shapes(
    vocab_size: int, n_embd: int, n_layer: int, head_size: int, ffn_width: int, shift: int, decay: int
) -> Shapes:
    """The names and shapes of RWKV-LM's x060, written down apart from our models."""
    V, C, L, N, F = vocab_size, n_embd, n_layer, head_size, ffn_width
    block: Shapes = {f"att.time_maa_{name}": (1, 1, C) for name in "xwkvrg"}
    block |= {"att.time_maa_w1": (C, 5 * shift), "att.time_maa_w2": (5, shift, C)}
    block |= {"att.time_decay": (1, 1, C), "att.time_faaaa": (C // N, N)}
    block |= {"att.time_decay_w1": (C, decay), "att.time_decay_w2": (decay, C)}
    block |= {f"att.{name}.weight": (C, C) for name in ("receptance", "key", "value", "output", "gate")}
    block |= {"att.ln_x.weight": (C,), "att.ln_x.bias": (C,)}
    block |= {"ffn.time_maa_k": (1, 1, C), "ffn.time_maa_r": (1, 1, C)}
    block |= {"ffn.key.weight": (F, C), "ffn.receptance.weight": (C, C), "ffn.value.weight": (C, F)}
    return _common_shapes(V, C, L) | {
        f"blocks.{i}.{name}": shape for i in range(L) for name, shape in block.items()
    }


def _rwkv7_shapes(
    vocab_size: int, n_embd: int, n_layer: int, head_size: int, ranks: dict[str, int]
) -> Shapes:
    """The names and shapes of RWKV-LM's x070, written down apart from our models."""
    V, C, L, N = vocab_size, n_embd, n_layer, head_size
    vectors = ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a"]
    block: Shapes = {f"att.{name}": (1, 1, C) for name in vectors} | {"att.r_k": (C // N, N)}
    for name, rank in ranks.items():
        block |= {f"att.{name}1": (C, rank), f"att.{name}2": (rank, C)}
    block |= {f"att.{name}.weight": (C, C) for name in ("receptance", "key", "value", "output")}
    block |= {"att.ln_x.weight": (C,), "att.ln_x.bias": (C,)}
    block |= {"ffn.x_k": (1, 1, C), "ffn.key.weight": (4 * C, C), "ffn.value.weight": (C, 4 * C)}
    return _common_shapes(V, C, L) | {
        f"blocks.{i}.{name}": shape for i in range(L) for name, shape in block.items()
    }


@pytest.fixture
def rwkv4_shapes() -> Callable[..., Shapes]:
    return _rwkv4_shapes


@pytest.fixture
def rwkv5_shapes() -> Callable[..., Shapes]:
    return _rwkv5_shapes


@pytest.fixture
def rwkv6_shapes() -> Callable[..., Shapes]:
    return _rwkv6_shapes


@pytest.fixture
def rwkv7_shapes() -> Callable[..., Shapes]:
    return _rwkv7_shapes


@pytest.fixture
def random_tensors() -> Callable[..., Tensors]:
    def make(shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}

    return make


_EAGLE = {"n_layer": 2, "n_embd": 32, "head_size": 8, "ffn_width": 42, "vocab_size": 60, "ctx_len": 16}
_CONFIGS: dict[str, ModelConfig] = {
    "rwkv4": Rwkv4Config(n_layer=2, n_embd=32, vocab_size=60, ctx_len=16),
    "rwkv5.0": Rwkv5Config(**_EAGLE, version="5.0", bonus="time_first"),
    "rwkv5.1": Rwkv5Config(**_EAGLE, version="5.1"),
    "rwkv5.2": Rwkv5Config(**_EAGLE),
    "rwkv6": Rwkv6Config(**_EAGLE, lora_ranks=Rwkv6Ranks(shift=3, decay=5)),
    "rwkv7": Rwkv7Config(
        n_layer=2,
        n_embd=32,
        head_size=16,
        vocab_size=60,
        ctx_len=16,
        lora_ranks=LoraRanks(w=5, a=6, v=7, g=9),
    ),
}


@pytest.fixture
def shapes_of() -> Callable[[str], Shapes]:
    """Shapes of the small model of an architecture, RWKV-5 with its minor version."""

    def get(arch: str) -> Shapes:
        if arch == "rwkv4":
            return _rwkv4_shapes(60, 32, 2)
        if arch.startswith("rwkv5"):
            bonus = "time_first" if arch == "rwkv5.0" else "time_faaaa"
            return _rwkv5_shapes(60, 32, 2, 8, 42, arch.removeprefix("rwkv"), bonus)
        if arch == "rwkv6":
            return _rwkv6_shapes(60, 32, 2, 8, 42, 3, 5)
        return _rwkv7_shapes(60, 32, 2, 16, {"w": 5, "a": 6, "v": 7, "g": 9})

    return get


@pytest.fixture
def config_of() -> Callable[[str], ModelConfig]:
    """Settings of the small model of an architecture."""
    return _CONFIGS.__getitem__


@pytest.fixture
def tensors_of(shapes_of, random_tensors) -> Callable[..., Tensors]:
    """Random weights of the small model of an architecture."""

    def make(arch: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
        return random_tensors(shapes_of(arch), seed, dtype)

    return make


_NEVER_TRAINED = {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}


@pytest.fixture
def training_state(tensors_of) -> Callable[..., TrainingState]:
    """A training checkpoint's content, different for each step."""

    def make(step: int, arch: str = "rwkv7") -> TrainingState:
        weights = tensors_of(arch, seed=3 * step)
        trained = [name for name in weights if name not in _NEVER_TRAINED]
        first, second = tensors_of(arch, seed=3 * step + 1), tensors_of(arch, seed=3 * step + 2)
        return TrainingState(
            weights,
            {name: first[name] for name in trained},
            {name: second[name].square() for name in trained},
            {
                "step": step,
                "tokens": 1000 * step,
                "config": {"trainer": {"seed": 1}},
                "tokenizer": {"name": "bytes", "sha256": "ab" * 32},
                "arch_config": to_tree(_CONFIGS[arch]),
                "random": {"cpu": "AAEC"},
                "data": {"samples": 8 * step},
            },
        )

    return make


@pytest.fixture
def run(tmp_path, training_state) -> Path:
    """The out_dir of a run with three checkpoints."""
    for step in (5, 10, 15):
        state = training_state(step)
        save_training_checkpoint(tmp_path, state.manifest, state.parameters())
    return tmp_path


@pytest.fixture
def folder(run) -> Path:
    """The newest checkpoint of that run."""
    return run / "checkpoints" / "step-00000015"


class Killed(BaseException):
    """The process is gone: nothing that it would still do happens."""


@pytest.fixture
def killed() -> type[BaseException]:
    return Killed


@pytest.fixture
def die_after(monkeypatch) -> Callable[[int], object]:
    """Let ``n`` changes of the file system happen, leave the next one half done, and no other after it."""

    @contextmanager
    def until(n: int) -> Iterator[None]:
        done = 0

        def wrap(owner: object, name: str, half_done: Callable[..., None] | None = None) -> None:
            original = getattr(owner, name)

            def step(*args: object, **kwargs: object) -> object:
                nonlocal done
                done += 1
                if done <= n:
                    return original(*args, **kwargs)
                if done == n + 1 and half_done is not None:
                    half_done(original, *args, **kwargs)
                raise Killed

            patch.setattr(owner, name, step)

        with monkeypatch.context() as patch:
            wrap(Path, "mkdir")
            wrap(Path, "rename")
            wrap(Path, "replace")
            wrap(Path, "unlink")
            wrap(
                Path, "write_text", lambda write, path, text, **kw: write(path, text[: len(text) // 2], **kw)
            )
            wrap(shutil, "rmtree", _remove_one_file)
            wrap(SafetensorsWriter, "_write_table")
            wrap(writing, "save_pth", _write_half)
            wrap(os, "fsync")
            yield

    return until


def _write_half(save: Callable[..., None], path: Path, tensors: object) -> None:
    save(path, tensors)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _remove_one_file(_remove: Callable[..., None], folder: Path, **_kwargs: object) -> None:
    for path in list(folder.iterdir())[:1] if folder.exists() else []:
        os.unlink(path)  # noqa: PTH108 - pathlib's is dying too
