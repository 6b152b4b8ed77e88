"""Weights written in another format: one tensor at a time, read back, and named only when they are right."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

import torch

from rwkv_train.checkpoints.descriptions import write_json
from rwkv_train.checkpoints.formats import CHECKPOINTS_FOLDER, CONFIG_FILE, FORMAT_VERSION
from rwkv_train.checkpoints.gguf_file import FloatType, plan_gguf, write_gguf
from rwkv_train.checkpoints.hugging_face import (
    TOKENIZER_FILES,
    LayoutName,
    hugging_face_layout,
    tokenizer_files,
)
from rwkv_train.checkpoints.infer import check_tensors, infer_config, make_explicit
from rwkv_train.checkpoints.io import (
    new_file,
    new_folder,
    require_space,
    require_writable,
    resolve_target,
    sha256_of,
)
from rwkv_train.checkpoints.manifest import WEIGHTS
from rwkv_train.checkpoints.pth import read_pth, save_pth
from rwkv_train.checkpoints.run_folder import is_checkpoint_name
from rwkv_train.checkpoints.tensor_files import TensorFiles, is_tensor_file, write_tensor_files
from rwkv_train.checkpoints.tensor_source import TensorSource
from rwkv_train.checkpoints.tensors import DTYPES, cast_all, require_same_bits
from rwkv_train.checkpoints.weights import Weights
from rwkv_train.config.load import NOT_IN_WEIGHTS
from rwkv_train.config.model import ModelConfig
from rwkv_train.config.save import to_tree
from rwkv_train.errors import CheckpointError
from rwkv_train.models.registry import unused_parameters

logger = logging.getLogger(__name__)

TargetFormat = Literal["pth", "safetensors", "hf", "hf-remote", "gguf"]
"""What is written: an official file; our folder of weights and their description; a folder for Hugging Face's
libraries; one in the layout of the ``RWKV/`` repositories; a file for llama.cpp."""

StoredDtype = torch.dtype | Literal["q8_0"]
"""What weights are rounded to: ``torch.float32``, ``torch.bfloat16``, ``torch.float16``, or for ``"gguf"`` alone
``"q8_0"``, integers of 8 bits with a scale for each 32."""

UnusedTensors = Literal["keep", "drop", "fill"]
"""Which of the tensors that the model does not use (RWKV-7: ``blocks.0.att.v0/v1/v2``) are written: those that the
source has, none, or all of them, zeros where the source lacks them."""


class _Job(NamedTuple):
    """What a writer gets."""

    target: Path
    """Where it goes in the end, for messages."""
    to: TargetFormat
    weights: Weights
    tensors: TensorSource
    """The tensors to be written, under their official names."""
    dtype: StoredDtype | None

    def cast(self) -> TensorSource:
        """Return the tensors in the wanted dtype."""
        assert self.dtype != "q8_0"
        return cast_all(self.target, self.tensors, self.dtype)


class _Prepared(NamedTuple):
    """What a writer makes of a job before anything is written."""

    n_tensors: int
    n_bytes: int
    write: Callable[[Path], None]
    """Writes a file or folder, reads it back and compares it."""


class _Writer(NamedTuple):
    """How weights are written in one format."""

    is_folder: bool
    prepare: Callable[[_Job], _Prepared]
    owns: Callable[[str], bool] = lambda name: False
    """Tells whether a folder may hold a file of that name and still be replaced."""
    unused: tuple[UnusedTensors, ...] = get_args(UnusedTensors)
    """What may be asked for about the unused tensors."""


class Plan(NamedTuple):
    """What is to be written, and where; nothing has changed yet."""

    target: Path
    """The file or folder, symbolic links followed."""
    is_folder: bool
    may_replace: bool
    """Whether what is there then is replaced."""
    n_tensors: int
    """Number of tensors in it."""
    n_bytes: int
    """Size of its tensors."""
    write: Callable[[Path], None]
    """Writes it to a path, reads it back and compares it."""


def plan_writing(
    path: str | Path,
    weights: Weights,
    to: TargetFormat,
    dtype: StoredDtype | None = None,
    *,
    v7_block0: UnusedTensors = "keep",
    overwrite: bool = False,
) -> Plan:
    """Check that weights can be written as asked.

    Args:
        path: a file for ``"pth"`` and ``"gguf"``, else a folder.
        weights: what to write.
        to: the format.
        dtype: round every weight to this dtype; ``None`` keeps each as it is.
        v7_block0: which of RWKV-7's unused tensors are in it; some published files and readers have none.
        overwrite: replace what is there; of folders only those that hold nothing but files of the format.

    Raises:
        CheckpointError: there is something at ``path``, or it is among the checkpoints of a run; the disk is too full,
            tensors do not fit ``weights.config``, or the format has no place for such a model.
        ValueError: the dtype is none that the format has.
    """
    writer = _WRITERS[to]
    known = {None, *DTYPES.values()} | ({"q8_0"} if to == "gguf" else set())
    if dtype not in known:
        names = ", ".join(sorted(str(one) for one in known if one is not None))
        raise ValueError(f"dtype ({dtype}) of format '{to}' must be one of {names}")
    target = resolve_target(path)
    _refuse_existing(target, writer, to, overwrite)
    if target.parent.name == CHECKPOINTS_FOLDER and is_checkpoint_name(target.name):
        raise CheckpointError(f"{target} is the place of a run's own checkpoint; choose another folder")
    if v7_block0 not in writer.unused:
        raise CheckpointError(
            f"v7_block0 is '{v7_block0}', but the format '{to}' says itself what becomes of these tensors; leave it at "
            "'keep'"
        )
    tensors = TensorSource.of(weights.tensors)
    check_tensors(weights.config, tensors.headers)
    unused = unused_parameters(weights.config.arch)
    if v7_block0 != "keep" and not unused:
        raise CheckpointError(
            f"v7_block0 is '{v7_block0}', but every tensor of an {weights.config.arch} is used; leave it at 'keep'"
        )
    dropped = {"keep": weights.absent, "drop": unused, "fill": frozenset[str]()}[v7_block0]
    kept = tensors.renamed({name: name for name in tensors if name not in dropped})
    prepared = writer.prepare(_Job(target, to, weights, kept, dtype))
    require_writable(target)
    require_space(target, prepared.n_bytes)
    return Plan(target, writer.is_folder, overwrite, *prepared)


def carry_out(plan: Plan) -> Path:
    """Write what was planned, read it back and compare every bit, and only then give it its name.

    Returns:
        ``plan.target``.

    Raises:
        CheckpointError: it cannot be written, a weight is too large for its dtype, or the disk is at fault; what was
            at the target is still there.
    """
    make = new_folder if plan.is_folder else new_file
    with make(plan.target, plan.n_bytes) as new:
        plan.write(new)
        if plan.target.exists() and not plan.may_replace:  # another one was faster
            raise already_there(plan.target)
    return plan.target


def write_weights(
    path: str | Path,
    weights: Weights,
    to: TargetFormat,
    dtype: StoredDtype | None = None,
    *,
    v7_block0: UnusedTensors = "keep",
    overwrite: bool = False,
) -> Path:
    """Plan and carry out: see :func:`plan_writing` and :func:`carry_out`."""
    return carry_out(plan_writing(path, weights, to, dtype, v7_block0=v7_block0, overwrite=overwrite))


def _refuse_existing(target: Path, writer: _Writer, to: TargetFormat, overwrite: bool) -> None:
    if target.is_dir() and not writer.is_folder:
        raise CheckpointError(f"{target} is a folder; {to} needs the name of a file")
    if not target.exists():
        return
    if not overwrite:
        raise already_there(target)
    if not writer.is_folder and not target.is_file():
        raise CheckpointError(
            f"{target} is not replaced: it is no file but a device or the like; choose another name"
        )
    if writer.is_folder and not (
        target.is_dir() and all(file.is_file() and writer.owns(file.name) for file in target.iterdir())
    ):
        raise CheckpointError(
            f"{target} is not replaced: it is no folder of just a model's files; choose another name"
        )


def already_there(target: str | Path) -> CheckpointError:
    """Return the error about a target that must not be replaced."""
    return CheckpointError(f"{target} is already there; choose another name, or replace it with --overwrite")


def _prepare_pth(job: _Job) -> _Prepared:
    tensors = job.cast()
    _require_that_weights_tell(job.weights.config, tensors)

    def write(path: Path) -> None:
        save_pth(path, tensors)
        require_same_bits(job.target, tensors, TensorSource.of(read_pth(path)))

    return _Prepared(len(tensors), tensors.n_bytes, write)


def _require_that_weights_tell(config: ModelConfig, tensors: TensorSource) -> None:
    """Refuse a setting that is part of the model's function and that no reader of bare weights would know."""
    inferred = infer_config(tensors.headers)
    for name, value in config.explicit():
        # Of the ranks only that of an unused tensor may be another one.
        if name not in {*NOT_IN_WEIGHTS, "lora_ranks"} and value != getattr(inferred, name):
            raise CheckpointError(
                f"a .pth holds weights alone, and who reads them takes {name} to be {getattr(inferred, name)}; this "
                f"model has {value}: choose --to safetensors"
            )


def _prepare_safetensors(job: _Job) -> _Prepared:
    weights, tensors = job.weights, job.cast()

    def write(folder: Path) -> None:
        names = _write_and_compare(folder, job.target, tensors)
        description = {
            "format": FORMAT_VERSION,
            "model": to_tree(make_explicit(weights.config)),
            "tokenizer": None if weights.tokenizer is None else weights.tokenizer._asdict(),
            "step": weights.step,
            "files": {name: sha256_of(folder / name) for name in names},
        }
        write_json(folder / CONFIG_FILE, description)

    return _Prepared(len(tensors), tensors.n_bytes, write)


def _prepare_hugging_face(job: _Job) -> _Prepared:
    config = job.weights.config
    tokenizer = tokenizer_files(job.weights.tokenizer, config.vocab_size)
    layout = hugging_face_layout(
        config, job.cast(), cast("LayoutName", job.to), end_of_document=tokenizer.end_of_document
    )
    if tokenizer.note is not None:
        logger.warning("%s: %s", job.target, tokenizer.note)

    def write(folder: Path) -> None:
        _write_and_compare(folder, job.target, layout.tensors)
        write_json(folder / CONFIG_FILE, layout.config_json)
        for name, content in tokenizer.files.items():
            (folder / name).write_bytes(content)

    return _Prepared(len(layout.tensors), layout.tensors.n_bytes, write)


def _prepare_gguf(job: _Job) -> _Prepared:
    float_type = _FLOAT_TYPES[job.dtype or job.tensors.headers["head.weight"].dtype]
    plan = plan_gguf(job.target, job.weights.config, job.tensors, float_type, job.weights.tokenizer)
    return _Prepared(len(plan.entries), plan.n_bytes, lambda path: write_gguf(path, plan))


_FLOAT_TYPES: Mapping[StoredDtype, FloatType] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    "q8_0": "Q8_0",
}


def _write_and_compare(folder: Path, target: Path, tensors: TensorSource) -> list[str]:
    """Write safetensors files and return their names."""
    names = write_tensor_files(folder, WEIGHTS, tensors)
    require_same_bits(target, tensors, TensorFiles(folder, names))
    return names


def _is_of_ours(name: str) -> bool:
    return name == CONFIG_FILE or is_tensor_file(WEIGHTS, name)


def _is_of_hugging_face(name: str) -> bool:
    return _is_of_ours(name) or name in TOKENIZER_FILES


_WRITERS: Mapping[TargetFormat, _Writer] = {
    "pth": _Writer(is_folder=False, prepare=_prepare_pth),
    "safetensors": _Writer(is_folder=True, prepare=_prepare_safetensors, owns=_is_of_ours),
    "hf": _Writer(True, _prepare_hugging_face, _is_of_hugging_face, unused=("keep", "drop")),
    "hf-remote": _Writer(True, _prepare_hugging_face, _is_of_hugging_face, unused=("keep", "drop")),
    "gguf": _Writer(is_folder=False, prepare=_prepare_gguf, unused=("keep",)),
}
