"""Named tensors that are read or made when they are asked for, so that a model need not fit into memory."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


class TensorSource(Mapping[str, Tensor]):
    """A dictionary of tensors that holds none of them.

    Args:
        headers: name -> a tensor on the device "meta": shape and dtype without values.
        read: gives the tensor of a name, on the CPU, of that shape and dtype; it may be mapped from the disk, so
            copy before you change it.
    """

    def __init__(self, headers: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        self.headers = dict(headers)
        """Name -> a tensor of its shape and dtype, without values."""
        self._read = read

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "TensorSource":
        """Return ``tensors`` as a source; one that is a source already stays what it is."""
        if isinstance(tensors, cls):
            return tensors
        return cls({name: header_of(tensor) for name, tensor in tensors.items()}, tensors.__getitem__)

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor, read or made anew each time.

        Raises:
            KeyError: there is none of that name.
            CheckpointError: its file is damaged.
        """
        if name not in self.headers:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in their order."""
        return iter(self.headers)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.headers)

    def __contains__(self, name: object) -> bool:
        """Tell whether there is a tensor of that name, without reading it."""
        return name in self.headers

    @property
    def n_bytes(self) -> int:
        """Size of all values in bytes."""
        return sum(header.nbytes for header in self.headers.values())

    def renamed(self, names: Mapping[str, str]) -> "TensorSource":
        """Return the same tensors under other names and in another order.

        Args:
            names: new name -> the name here; what is not in it is left out.
        """
        return TensorSource(
            {new: self.headers[old] for new, old in names.items()}, lambda new: self._read(names[new])
        )


def header_of(tensor: Tensor) -> Tensor:
    """Return a tensor's shape and dtype without its values: a tensor on the device "meta"."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
