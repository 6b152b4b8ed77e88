"""One ``.gguf`` file for llama.cpp: sizes, the World vocabulary and the weights of an RWKV-6 or RWKV-7.

The package ``gguf`` writes what stands before the weights and quantizes; it is an optional part of the
installation. The weights follow tensor by tensor and piece by piece, so that a model need not fit into memory.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rwkv_train.checkpoints.gguf_layout import GgufTensor, gguf_metadata, gguf_tensors
from rwkv_train.checkpoints.io import sha256_of
from rwkv_train.checkpoints.tensor_source import TensorSource
from rwkv_train.checkpoints.tensors import cast
from rwkv_train.config.model import ModelConfig
from rwkv_train.errors import CheckpointError
from rwkv_train.tokenizers import Tokenizer, TokenizerIdentity, load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

logger = logging.getLogger(__name__)

FloatType = Literal["F32", "F16", "BF16", "Q8_0"]
"""How matrices are stored. Q8_0: blocks of 32 integers of 8 bits with a float16 scale."""


class _Type(NamedTuple):
    code: int
    """Of a tensor, in the file's table."""
    file_code: int
    """Of the file, in its metadata."""
    block_size: int
    """Numbers that are stored together; a row consists of whole blocks."""
    block_bytes: int
    rescale_every: int
    """As for :func:`gguf_tensors`. Where llama.cpp may multiply in float16, the number of the published files."""


_TYPES: dict[FloatType, _Type] = {
    "F32": _Type(0, 0, 1, 4, 0),
    "F16": _Type(1, 1, 1, 2, 6),
    "BF16": _Type(30, 32, 1, 2, 0),
    "Q8_0": _Type(8, 7, 32, 34, 6),
}

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_LARGEST_Q8_0 = 127 * 65504.0

_ALIGNMENT = 32
"""Each tensor starts at a multiple of so many bytes."""

_PIECE = 1 << 22
"""Numbers that are converted at a time."""

_HEADER_BYTES = 1 << 21
"""What stands before the weights, roughly: mostly the vocabulary."""

_PUBLISHED_VOCAB_SIZE = 65_536
"""Rows of the embedding of all published models with the World vocabulary."""

_BLANK_LINE = 261
"""World's token with which an answer of the chat models ends."""

_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # kinds of tokens

_CHAT_TEMPLATE = """\
{#- rwkv-world -#}
{{- bos_token -}}
{%- for message in messages -%}
    {{- message['role'] | capitalize + ': ' + message['content'] | trim + '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Assistant:' -}}
{%- endif -%}"""
# Its first line is the name by which a llama.cpp without Jinja knows it.


class GgufPlan(NamedTuple):
    """What is to be written; nothing has changed yet."""

    target: Path
    """Where the file goes in the end; it names the model."""
    config: ModelConfig
    tensors: TensorSource
    """Weights by their official names."""
    float_type: FloatType
    entries: "Sequence[_Entry]"
    """What the file holds, in its order."""
    world: Tokenizer

    @property
    def n_bytes(self) -> int:
        """Size of the file, roughly."""
        return sum(entry.n_bytes for entry in self.entries) + _HEADER_BYTES


def plan_gguf(
    target: Path,
    config: ModelConfig,
    tensors: TensorSource,
    float_type: FloatType,
    tokenizer: TokenizerIdentity | None = None,
) -> GgufPlan:
    """Check that a model can become a file that llama.cpp runs.

    Matrices are stored as ``float_type``; one whose rows are no whole blocks of Q8_0 as F16, as llama.cpp
    does it. Norms, mixes and low-rank factors are float32.

    Args:
        target: where the file goes.
        config: settings of the model.
        tensors: its weights by their official names, dense floats that fit ``config``.
        float_type: type of the matrices.
        tokenizer: the tokenizer it was trained with; ``None`` where nothing tells, which is taken for World
            if the model has 65536 tokens, like the published ones.

    Raises:
        CheckpointError: llama.cpp cannot run this model or has not its tokenizer, or the package ``gguf`` is
            missing.
    """
    layout = gguf_tensors(config, _TYPES[float_type].rescale_every)
    world = _require_world(config.vocab_size, tokenizer)
    _require_package()
    entries = [_Entry(tensor, _header(tensor, tensors), float_type) for tensor in layout]
    _tell_of_unfit_rows(entries, float_type)
    return GgufPlan(target, config, tensors, float_type, entries, world)


def write_gguf(path: Path, plan: GgufPlan) -> None:
    """Write what was planned, read it back and compare it; use :func:`new_file` to do it safely.

    Args:
        path: the file.
        plan: from :func:`plan_gguf`.

    Raises:
        CheckpointError: a weight is too large for the type, or the disk is at fault.
        OSError: the operating system refuses.
    """
    metadata = gguf_metadata(plan.config, _TYPES[plan.float_type].rescale_every)
    _write_head(path, plan.target.stem, plan.config, metadata, plan.float_type, plan.entries, plan.world)
    if _append_values(path, plan.target, plan.entries, plan.tensors) != sha256_of(path):
        raise CheckpointError(f"{plan.target} does not read back as it was written; check the disk")


class _Entry:
    """A tensor of the file with its shape and the type that it is stored in."""

    def __init__(self, tensor: GgufTensor, header: Tensor, float_type: FloatType) -> None:
        self.tensor = tensor
        self.shape = tuple(header.shape)
        self.is_unfit = tensor.is_matrix and self.shape[-1] % _TYPES[float_type].block_size != 0
        self.type: FloatType = "F32" if not tensor.is_matrix else "F16" if self.is_unfit else float_type
        kind = _TYPES[self.type]
        self.n_bytes = header.numel() // kind.block_size * kind.block_bytes


def _header(tensor: GgufTensor, tensors: TensorSource) -> Tensor:
    return tensor.transform([tensors.headers[name] for name in tensor.sources])


def _tell_of_unfit_rows(entries: Sequence[_Entry], float_type: FloatType) -> None:
    unfit = [entry for entry in entries if entry.is_unfit]
    if unfit:
        logger.warning(
            "%d of %d matrices are stored as F16, not %s, whose rows must be multiples of %d; the first is '%s' "
            "with rows of %d",
            len(unfit),
            sum(entry.tensor.is_matrix for entry in entries),
            float_type,
            _TYPES[float_type].block_size,
            unfit[0].tensor.name,
            unfit[0].shape[-1],
        )


def _require_package() -> None:
    try:
        import gguf  # noqa: F401, PLC0415 - an optional package
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise CheckpointError(
            "GGUF files need the package 'gguf', which is not installed: pip install 'rwkv-train[gguf]'"
        ) from error


def _require_world(vocab_size: int, identity: TokenizerIdentity | None) -> Tokenizer:
    """Return the World tokenizer if it is the model's."""
    world = load_tokenizer("world")
    if identity is None:
        if vocab_size != _PUBLISHED_VOCAB_SIZE:
            raise CheckpointError(
                f"the weights do not say which tokenizer they were trained with, and vocab_size is {vocab_size}, not "
                f"{_PUBLISHED_VOCAB_SIZE} as with RWKV's World vocabulary, the only one of RWKV that llama.cpp has"
            )
    elif not identity.matches(world.identity):
        raise CheckpointError(
            f"the model was trained with the tokenizer '{identity.name}'; of RWKV's tokenizers llama.cpp has only "
            "'world', so there is no GGUF file of this model"
        )
    elif vocab_size < world.vocab_size:
        raise CheckpointError(
            f"vocab_size is {vocab_size}, but the tokenizer 'world' has {world.vocab_size} tokens"
        )
    return world


def _write_head(
    path: Path,
    model_name: str,
    config: ModelConfig,
    metadata: dict[str, int | float],
    float_type: FloatType,
    entries: Sequence[_Entry],
    world: Tokenizer,
) -> None:
    """Write all that stands before the weights, with the blanks up to the first of them."""
    import gguf  # noqa: PLC0415 - an optional package

    with closing(gguf.GGUFWriter(path, config.arch)) as writer:
        for entry in entries:
            writer.add_tensor_info(
                entry.tensor.name,
                entry.shape,
                np.dtype(np.float32),  # without effect beside raw_dtype
                entry.n_bytes,
                raw_dtype=gguf.GGMLQuantizationType(_TYPES[entry.type].code),
            )
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(model_name)
        writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
        writer.add_file_type(_TYPES[float_type].file_code)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in metadata.items():
            if isinstance(value, float):
                writer.add_float32(key, value)
            else:
                writer.add_uint32(key, value)
        _add_vocabulary(writer, config.vocab_size, world)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    with path.open("ab") as file:
        file.write(bytes(-file.tell() % _ALIGNMENT))


def _add_vocabulary(writer: "GGUFWriter", vocab_size: int, world: Tokenizer) -> None:
    """Add World's tokens, their roles and the template of a chat."""
    pieces = [world.decode_bytes([token]) for token in range(1, world.vocab_size)]
    n_unused = vocab_size - world.vocab_size
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(
        [
            b"<s>",
            # As Python writes bytes between b' and ': so llama.cpp reads them.
            *(repr(piece)[2:-1].encode() for piece in pieces),
            *(b"[PAD%d]" % token for token in range(world.vocab_size, vocab_size)),
        ]
    )
    writer.add_token_types([_CONTROL] + [_NORMAL] * len(pieces) + [_UNUSED] * n_unused)
    writer.add_bos_token_id(world.end_of_document)
    writer.add_eos_token_id(world.end_of_document)
    writer.add_eot_token_id(_BLANK_LINE)
    writer.add_chat_template(_CHAT_TEMPLATE)


def _append_values(path: Path, target: Path, entries: Sequence[_Entry], tensors: TensorSource) -> str:
    """Write the weights after the head, and return the SHA-256 of all that the file should now hold."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    with path.open("ab") as file:
        for entry in entries:
            n_bytes = 0
            for piece in _encoded(target, entry, tensors):
                file.write(piece.data)
                digest.update(piece.data)
                n_bytes += piece.nbytes
            assert n_bytes == entry.n_bytes, f"{entry.tensor.name} takes {n_bytes} bytes, not {entry.n_bytes}"
            blanks = bytes(-n_bytes % _ALIGNMENT)
            file.write(blanks)
            digest.update(blanks)
    return digest.hexdigest()


def _encoded(target: Path, entry: _Entry, tensors: TensorSource) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the bytes of one tensor."""
    values = entry.tensor.transform([tensors[name] for name in entry.tensor.sources]).detach()
    name = entry.tensor.sources[0]
    rows = values.reshape(-1, values.shape[-1])
    n_rows = max(1, _PIECE // rows.shape[-1])
    for first in range(0, len(rows), n_rows):
        numbers = rows[first : first + n_rows]
        if entry.tensor.divisor != 1:
            numbers = numbers.float() / entry.tensor.divisor
        if entry.type == "Q8_0":
            yield _quantized(target, name, numbers.float())
        else:
            stored = cast(target, name, numbers, _DTYPES[entry.type])
            yield stored.contiguous().view(torch.uint8).numpy()


def _quantized(target: Path, name: str, numbers: Tensor) -> npt.NDArray[np.uint8]:
    """Return the blocks of float32 rows in Q8_0."""
    from gguf import GGMLQuantizationType, quants  # noqa: PLC0415 - an optional package

    largest = numbers.abs().max().item()
    if not largest <= _LARGEST_Q8_0:  # or not a number
        raise CheckpointError(
            f"{target}: tensor '{name}' holds {largest:g}, which Q8_0 cannot hold; choose F32 or BF16"
        )
    return quants.quantize(numbers.numpy(), GGMLQuantizationType.Q8_0)
