"""What foreign training checkpoints may ask for beside tensors: a list of names, each with a harmless stand-in.

A checkpoint of DeepSpeed or Lightning holds objects of their classes and settings of its owner (paths, numbers
of numpy). Nothing of that is needed for the weights, so nothing of it is imported: the name of a class on this
list gives an object that takes what it is given and does nothing. A name that is not on it is refused.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Self


class StandIn:
    """Stands for an object of a foreign class: it keeps what it was given and does nothing with it."""

    state: object
    """The attributes that the object had, as they were stored; ``None`` where there were none."""

    def __new__(cls, *_args: object, **_kwargs: object) -> Self:
        """Make one, whatever the arguments."""
        self = super().__new__(cls)
        self.state = None
        return self

    def __setstate__(self, state: object) -> None:
        """Keep what the unpickler hands over, in whatever form."""
        self.state = state


_OBJECTS = (
    "deepspeed.runtime.bf16_optimizer.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.zero.offload_config.OffloadDeviceEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    # Lightning before 1.6 used the classes of callbacks as keys.
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "argparse.Namespace",
    "types.SimpleNamespace",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    *(
        f"{module}.{system}Path"
        for module in ("pathlib", "pathlib._local")
        for system in ("Posix", "Windows")
    ),
    *(f"pathlib.Pure{system}Path" for system in ("Posix", "Windows")),
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{made}" for core in ("core", "_core") for made in ("_reconstruct", "scalar")),
    "torch.torch_version.TorchVersion",
)
"""Classes and functions whose results become a :class:`StandIn`."""

_DICTIONARIES = (
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
"""Dictionaries by another name: PyTorch fills only its own kinds, so they become one of these."""

STAND_INS: Mapping[str, Callable[..., object]] = {
    **dict.fromkeys(_OBJECTS, StandIn),
    **dict.fromkeys(_DICTIONARIES, OrderedDict),
}
"""Full name in a pickle -> what is made in its place."""
