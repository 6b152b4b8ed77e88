"""Lightning's ``.ckpt`` files, as a foreign format: of all that such a file holds, the weights.

It is what ``torch.save`` makes of one dictionary: ``state_dict``, the optimizer's states, loops, callbacks,
settings of the run. The settings may be objects of any class, which are never made: see ``stand_ins``.
"""

from pathlib import Path

from rwkv_train.checkpoints.pth import named_tensors, read_pickle
from rwkv_train.checkpoints.stand_ins import STAND_INS
from rwkv_train.checkpoints.tensor_source import TensorSource
from rwkv_train.checkpoints.tensors import require_dense
from rwkv_train.errors import CheckpointError

VERSION_KEY = "pytorch-lightning_version"
"""The key that every such file has."""


def read_lightning_ckpt(path: Path) -> tuple[TensorSource, int | None]:
    """Read the weights of a ``.ckpt`` file.

    Returns:
        Name in the LightningModule -> tensor, mapped from the disk, and the number of optimizer steps where it
        is told.

    Raises:
        CheckpointError: the file is damaged, asks for a class that is not allowed, or has no weights.
    """
    content = read_pickle(path, STAND_INS)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{path} is a file of Lightning without a 'state_dict', so it has no weights")
    step = content.get("global_step")
    tensors = named_tensors(path, content["state_dict"])
    require_dense(path, tensors)
    return TensorSource.of(tensors), step if type(step) is int and step >= 0 else None
