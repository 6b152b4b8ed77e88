"""Log-probabilities of the answers under the model before the run: computed once, and kept in a file.

The file is safetensors: ``D.chosen`` and ``D.rejected`` for each dataset D, and in its metadata what they belong to.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rwkv_train.checkpoints.io import new_file
from rwkv_train.data.instruct.pairs import PreferencePair
from rwkv_train.data.instruct.rows import fill_pair_row, pack_pairs
from rwkv_train.errors import CheckpointError
from rwkv_train.finetuning.preferences import PairValues, sequence_log_probs

REFERENCE_FILE = "reference.safetensors"
"""Name of the file in the folder of a run."""

RowLosses = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A model: tokens and targets ``[1, T]`` and cu_seqlens ``[S + 1]`` -> loss of each target in nats, ``[1, T]``."""


class ReferenceLogProbs(NamedTuple):
    """Summed log-probabilities of all answers of a run."""

    datasets: tuple[PairValues, ...]
    """Of each dataset those of its pairs, in their order, ``[P]`` float32 on the CPU."""
    data: str
    """Whose pairs these are, as :func:`fingerprint_of` says it."""
    base: str
    """Which model gave them: any text that another model does not have."""


def fingerprint_of(datasets: Sequence[Sequence[PreferencePair]]) -> str:
    """Return the SHA-256 of all tokens and masks in their order, as 64 hex digits."""
    digest = hashlib.sha256()
    for pairs in datasets:
        digest.update(f"{len(pairs)} pairs\n".encode())
        for pair in pairs:
            for side in (pair.chosen, pair.rejected):
                digest.update(f"{len(side.tokens)} tokens\n".encode())
                digest.update(side.tokens.astype("<i8").tobytes())
                digest.update(side.is_learned.tobytes())
    return digest.hexdigest()


def compute_reference(
    losses_of: RowLosses,
    pairs: Sequence[PreferencePair],
    numbers: Sequence[int],
    ctx_len: int,
    *,
    device: torch.device | str = "cpu",
) -> PairValues:
    """Return the log-probabilities of some pairs, summed over each answer's tokens.

    Several processes may each be given a share of the numbers. The same numbers give the same bits.

    Args:
        losses_of: the model, without dropout.
        pairs: all of them.
        numbers: those to compute.
        ctx_len: tokens of a row.
        device: where the model is.

    Returns:
        ``[len(numbers)]`` float32 on the CPU, in the order of ``numbers``.
    """
    picked = [pairs[number] for number in numbers]
    rows = pack_pairs([pair.n_inputs for pair in picked], ctx_len)
    sums = []  # of each row [2 P], chosen and rejected in turn; on the device until the end, so that none is waited for
    with torch.no_grad():
        for row in rows:
            filled = fill_pair_row([picked[place] for place in row], ctx_len)
            tokens, targets, cu_seqlens = (torch.from_numpy(x).to(device) for x in filled[:3])
            losses = losses_of(tokens[None], targets[None], cu_seqlens)
            sums.append(sequence_log_probs(losses, targets[None], cu_seqlens)[0][: 2 * len(row)].float())
    values = torch.empty(len(picked), 2)
    if rows:
        places = torch.tensor([place for row in rows for place in row])
        values[places] = torch.cat(sums).view(-1, 2).cpu()
    return PairValues(values[:, 0].contiguous(), values[:, 1].contiguous())


def save_reference(path: Path, reference: ReferenceLogProbs) -> None:
    """Write the file; it appears whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    tensors = {
        f"{number}.{name}": values.contiguous()
        for number, dataset in enumerate(reference.datasets)
        for name, values in dataset._asdict().items()
    }
    metadata = {"format": "pt", "data": reference.data, "base": reference.base}
    with new_file(path, sum(values.nbytes for values in tensors.values())) as unfinished:
        save_file(tensors, unfinished, metadata)


def load_reference(path: Path, *, data: str, base: str) -> ReferenceLogProbs | None:
    """Read the file; ``None`` where there is none.

    Args:
        path: of :func:`save_reference`.
        data: what the pairs of the run are, as :func:`fingerprint_of` says it.
        base: the model that the run starts from, as it was given when the file was written.

    Raises:
        CheckpointError: it is damaged, no such file, or belongs to other pairs or another model.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; delete it, and it is computed again"
        ) from error
    names = [f"{number}.{name}" for number in range(len(tensors) // 2) for name in PairValues._fields]
    if set(tensors) != set(names) or not {"data", "base"} <= metadata.keys():
        raise CheckpointError(
            f"{path} does not hold log-probabilities of pairs: found {', '.join(sorted(tensors)[:3]) or 'no tensors'}; "
            "delete it, and they are computed again"
        )
    for name, wanted, whose in (("data", data, "other pairs"), ("base", base, "another model")):
        if metadata[name] != wanted:
            raise CheckpointError(
                f"{path} belongs to {whose} ({metadata[name]}, and the run has {wanted}); give the run another "
                "out_dir, or delete the file, and it is computed again"
            )
    values = [tensors[name] for name in names]
    return ReferenceLogProbs(tuple(map(PairValues, values[::2], values[1::2])), data, base)
