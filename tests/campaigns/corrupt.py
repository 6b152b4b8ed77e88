"""Campaign ``corrupt``: damaged checkpoints of every format that is read, and what becomes of them when converted.

A damaged one is refused with one line and exit code 2, or read as if it were whole. Where a format has no checksum,
values that were changed are what is in the file: then nothing else may differ.
"""

import contextlib
import io
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rwkv_train.checkpoints import ParameterState, convert, save_training_checkpoint
from rwkv_train.checkpoints.io import NEW_PREFIX
from rwkv_train.commands import main
from rwkv_train.config.model import LoraRanks, Rwkv7Config
from rwkv_train.config.save import to_tree
from rwkv_train.models.registry import build_model, initialize, unused_parameters
from tests.campaigns.record import Row, outcome

N_VARIANTS = 200
CONFIG = Rwkv7Config(
    n_layer=2, n_embd=32, head_size=16, vocab_size=60, ctx_len=16, lora_ranks=LoraRanks(w=5, a=6, v=7, g=9)
)


class Damage(NamedTuple):
    """What was done to a file."""

    kind: str
    content: bytes | None
    """What it holds now; ``None``: it is gone."""
    n_changed: int
    """How many values may differ, if the format has no checksum."""


# ---- whole checkpoints


def write_pth(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    torch.save(dict(tensors), folder / "x.pth")
    return folder / "x.pth"


def write_legacy_pth(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    torch.save(dict(tensors), folder / "x.pth", _use_new_zipfile_serialization=False)
    return folder / "x.pth"


def write_safetensors_file(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file(dict(tensors), folder / "x.safetensors")
    return folder / "x.safetensors"


def write_safetensors_folder(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    path = write_pth(folder, tensors)
    converted = convert(path, folder / "x", "safetensors").path
    path.unlink()
    return converted


def write_hugging_face_folder(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    path = write_pth(folder, tensors)
    converted = convert(path, folder / "x", "hf").path
    path.unlink()
    return converted


def write_training_checkpoint(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    manifest = {
        "step": 5,
        "tokens": 1000,
        "config": {},
        "tokenizer": {"name": "bytes", "sha256": "ab" * 32},
        "arch_config": to_tree(CONFIG),
        "random": {"cpu": "AAEC"},
        "data": {"samples": 40},
    }
    parameters = (
        ParameterState(name, weight, weight * 0.1, weight.square()) for name, weight in tensors.items()
    )
    return save_training_checkpoint(folder / "run", manifest, parameters, max_file_bytes=40_000)


def write_deepspeed_folder(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """As ZeRO 2 leaves it with two processes."""
    tag = folder / "x" / "global_step5"
    tag.mkdir(parents=True)
    (folder / "x" / "latest").write_text(tag.name)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    module = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    torch.save(
        {"module": module, "param_shapes": [shapes], "global_steps": 5}, tag / "mp_rank_00_model_states.pt"
    )
    row = torch.cat([tensor.flatten() for tensor in tensors.values()])
    row = torch.cat([row, torch.zeros(-len(row) % 2)])
    for rank, partition in enumerate(row.chunk(2)):
        state = {"single_partition_of_fp32_groups": [partition.clone()], "partition_count": 2}
        torch.save({"optimizer_state_dict": state}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder / "x"


def write_lightning_ckpt(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    state = {f"model.{name}": tensor for name, tensor in tensors.items()}
    torch.save(
        {"pytorch-lightning_version": "2.6.0", "state_dict": state, "global_step": 5}, folder / "x.ckpt"
    )
    return folder / "x.ckpt"


class CheckpointFormat(NamedTuple):
    """A format that is read."""

    write: Callable[[Path, Mapping[str, Tensor]], Path]
    has_checksum: bool


FORMATS = {
    "pth": CheckpointFormat(write_pth, has_checksum=True),
    "pth before 2020": CheckpointFormat(write_legacy_pth, has_checksum=False),
    "safetensors file": CheckpointFormat(write_safetensors_file, has_checksum=False),
    "safetensors folder": CheckpointFormat(write_safetensors_folder, has_checksum=True),
    "Hugging Face folder": CheckpointFormat(write_hugging_face_folder, has_checksum=False),
    "training checkpoint": CheckpointFormat(write_training_checkpoint, has_checksum=True),
    "DeepSpeed folder": CheckpointFormat(write_deepspeed_folder, has_checksum=True),
    "Lightning ckpt": CheckpointFormat(write_lightning_ckpt, has_checksum=True),
}


# ---- damage


def damage(content: bytes, names: list[str], draw: random.Random) -> Damage:
    """Damage a file's content in one of several ways."""
    kind = draw.choice(
        ["cut", "flip", "flip", "overwrite", "zeros", "hole", "insert", "swap", "swap", "gone"]
    )
    at = draw.randrange(len(content) + 1)
    length = draw.choice([1, 8, 64, 512])
    end = min(at + length, len(content))
    if kind == "gone":
        return Damage(kind, None, 0)
    if kind == "cut":
        return Damage(kind, content[:at], 0)
    if kind == "insert":
        return Damage(kind, content[:at] + draw.randbytes(length) + content[at:], 0)
    if kind == "hole":
        return Damage(kind, content[:at] + content[end:], 0)
    if kind == "swap":
        one, other = (name.encode() for name in _of_one_length(names, draw))
        marker = b"\0" * len(one)
        swapped = content.replace(one, marker).replace(other, one).replace(marker, other)
        return Damage(kind, swapped, sys.maxsize)
    changed = bytearray(content)
    if kind == "flip" and changed:
        changed[at % len(changed)] ^= 1 << draw.randrange(8)
        return Damage(kind, bytes(changed), 1)
    changed[at:end] = bytes(end - at) if kind == "zeros" else draw.randbytes(end - at)
    return Damage(kind, bytes(changed), end - at)


def _of_one_length(names: list[str], draw: random.Random) -> tuple[str, str]:
    """Two names of one length, so that what stands after them stays where it is."""
    one = draw.choice(names)
    return one, draw.choice([name for name in names if len(name) == len(one)])


# ---- the trial


class CorruptTrial:
    """Damages checkpoints of one format at a time.

    Args:
        work: folder for them.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        model = build_model(CONFIG)
        initialize(model, seed=0)
        # Without the unused ones, which not every format has.
        unused = unused_parameters(CONFIG.arch)
        self._tensors = {
            name: tensor.clone() for name, tensor in model.state_dict().items() if name not in unused
        }
        generator = torch.Generator().manual_seed(1)
        for tensor in self._tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)

    def run(self, name: str, n_variants: int = N_VARIANTS) -> Row:
        """Try variants of a format; return its row."""
        folder = self._work / name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "whole").mkdir(parents=True)
        whole = FORMATS[name].write(folder / "whole", self._tensors)
        ends: Counter[str] = Counter()
        kinds: Counter[str] = Counter()
        problems = []
        for seed in range(n_variants):
            draw = random.Random(f"{name} {seed}")
            shutil.rmtree(folder / "damaged", ignore_errors=True)
            shutil.copytree(folder / "whole", folder / "damaged")
            source = folder / "damaged" / whole.relative_to(folder / "whole")
            done = self._damage_a_file(source, draw)
            kinds[done.kind] += 1
            end, problem = self._convert(source, folder / "damaged" / "written", name, done)
            ends[end] += 1
            if problem:
                problems.append(f"seed {seed} ({done.kind}): {problem}")
        if not problems:
            shutil.rmtree(folder)
        return {
            "name": name,
            "variants": n_variants,
            "kinds": dict(sorted(kinds.items())),
            "ends": dict(sorted(ends.items())),
            "outcome": outcome(problems),
        }

    def _damage_a_file(self, source: Path, draw: random.Random) -> Damage:
        files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
        path = draw.choice(files)
        done = damage(path.read_bytes(), list(self._tensors), draw)
        if done.content is None:
            path.unlink()
        else:
            path.write_bytes(done.content)
        return done

    def _convert(self, source: Path, target: Path, name: str, done: Damage) -> tuple[str, str | None]:
        """How a conversion of the damaged checkpoint ended, and what is wrong with that."""
        code, out, err = _command("convert-checkpoint", source, target, "--to", "safetensors")
        left = [path.name for path in target.parent.iterdir() if path.name.startswith(NEW_PREFIX)]
        if left:
            return "leftovers", f"{left} are left"
        if code == 2:
            is_one_line = err.startswith("error: ") and err.count("\n") == 1 and not out
            return "refused", None if is_one_line and not target.exists() else f"it printed {out + err!r}"
        if code != 0:
            return "failed", f"exit code {code}: {err[-300:]}"
        read = load_file(target / "model.safetensors")
        n_different = sum(
            1 if tensor.shape != read[tensor_name].shape else int((tensor != read[tensor_name]).sum())
            for tensor_name, tensor in self._tensors.items()
        )
        if not n_different:
            return "read as it was", None
        if FORMATS[name].has_checksum or n_different > done.n_changed:
            return "read wrongly", f"{n_different} values are not what they were"
        if done.kind == "swap" and not _same_values(read, self._tensors):
            return "read wrongly", "values are not where the names say"
        return "read with the changed values", None


def _same_values(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two models hold the same tensors, under whatever names."""
    first, second = (sorted(t.numpy().tobytes() for t in tensors.values()) for tensors in (one, other))
    return first == second


def _command(*arguments: object) -> tuple[object, str, str]:
    """Run a command line in this process; its exit code and what it printed. What else it raises is its failure."""
    out, err = io.StringIO(), io.StringIO()
    with _as_arguments(arguments), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            return stop.code, out.getvalue(), err.getvalue()
        except Exception as error:  # noqa: BLE001 - a traceback is what this campaign looks for
            return repr(error), out.getvalue(), err.getvalue()
    return None, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def _as_arguments(arguments: tuple[object, ...]) -> Iterator[None]:
    before = sys.argv
    sys.argv = ["rwkv-train", *map(str, arguments)]
    try:
        yield
    finally:
        sys.argv = before


def totals(rows: list[Row]) -> Row:
    """Sum the formats up."""
    ends: Counter[str] = Counter()
    for row in rows:
        ends.update(row["ends"])
    return {
        "formats": len(rows),
        "variants": sum(row["variants"] for row in rows),
        "ends": dict(sorted(ends.items())),
    }
