"""What the commands that run a model have in common: which checkpoint, tokenizer, device and dtype."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rwkv_train.errors import BackendError

if TYPE_CHECKING:
    import torch

    from rwkv_train.models.lm import LanguageModel
    from rwkv_train.tokenizers import Tokenizer


class DtypeName(StrEnum):
    """What weights may be stored and computed in."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


CHECKPOINT_HELP = (
    "A .pth, safetensors file or folder, Hugging Face folder, training checkpoint, out_dir of a run, or "
    "hf:OWNER/NAME/FILE."
)
ADAPTER_HELP = (
    "A folder with adapter_config.json and adapter_model.safetensors, or a training checkpoint or the out_dir of a run "
    "that trained an adapter."
)
Checkpoint = Annotated[str, typer.Option(metavar="PATH", help=CHECKPOINT_HELP)]
AdapterPath = Annotated[
    str | None,
    typer.Option("--adapter", metavar="PATH", help=f"Merge an adapter into the model. {ADAPTER_HELP}"),
]
TokenizerName = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="NAME",
        help="bytes, world, neox or the path of a tokenizer.json; by default the one the checkpoint names.",
    ),
]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ...; auto: a GPU where there is one.")
]
Dtype = Annotated[DtypeName, typer.Option(help="What the model computes in.")]
STATE_HELP = (
    "Read every text from this state: a learned one (state.safetensors, an official .pth, or the run that learned it), "
    "or that of a saved conversation."
)
State = Annotated[Path | None, typer.Option(metavar="PATH", help=STATE_HELP)]


def load_for_inference(
    checkpoint: str,
    tokenizer: str | None,
    device: str,
    dtype: DtypeName,
    *,
    adapter: str | None = None,
    state: Path | None = None,
) -> "tuple[LanguageModel, Tokenizer]":
    """Load a checkpoint's model, with an adapter merged into it where there is one, and its tokenizer.

    Args:
        checkpoint: where it is.
        tokenizer: name of the tokenizer; ``None``: the one that the checkpoint names.
        device: as for :func:`find_device`.
        dtype: what the model computes in.
        adapter: where an adapter is that is merged into it; ``None``: none.
        state: file of the state that texts are read from; ``None``: the empty one.

    Raises:
        CheckpointError: the checkpoint, the adapter or the state cannot be read, or they are not of one model.
        DataError: the tokenizer is not the model's.
        BackendError: there is no such device.
    """
    from rwkv_train.checkpoints import load_model
    from rwkv_train.checkpoints.fingerprint import fingerprint
    from rwkv_train.checkpoints.states import read_state_file
    from rwkv_train.checkpoints.tensors import DTYPES
    from rwkv_train.checkpoints.tokenizer import choose_tokenizer
    from rwkv_train.models.start import FixedStart

    model, weights = load_model(
        checkpoint, device=find_device(device), dtype=DTYPES[dtype.value], adapter=adapter
    )
    if state is not None:
        # A model with an adapter is not the base that the file may name.
        base = fingerprint(weights.tensors) if adapter is None else None
        model.start = FixedStart(read_state_file(state, model.config, base=base))
    return model, choose_tokenizer(weights, tokenizer)


def find_device(name: str) -> "torch.device":
    """Return the device of a name; ``"auto"`` is a GPU where there is one.

    Raises:
        BackendError: there is no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        reason = str(error).split("\n", 1)[0]
        raise BackendError(f"there is no device '{name}' here: {reason}; wanted auto, cpu or cuda") from error
    device = torch.device(name)
    if device.type == "meta":
        raise BackendError("--device meta has no numbers to compute with; wanted auto, cpu or cuda")
    return device


def find_devices(name: str, n_devices: int) -> "list[torch.device]":
    """Return a device for each of several processes: GPUs from the first on, or the CPU, whose cores they share.

    Args:
        name: as for :func:`find_device`; several GPUs are not numbered.
        n_devices: how many there are to be, at least 1.

    Raises:
        BackendError: there are not so many.
    """
    import torch

    device = find_device(name)
    if n_devices == 1 or device.type == "cpu":
        return [device] * n_devices
    if device.index is not None:
        raise BackendError(
            f"--devices {n_devices} takes the first GPUs; --device {name} is one; wanted cuda or auto"
        )
    n_found = torch.cuda.device_count()
    if n_devices > n_found:
        raise BackendError(f"--devices is {n_devices}, but there are {n_found} GPUs here")
    return [torch.device(device.type, index) for index in range(n_devices)]
