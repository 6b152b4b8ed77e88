"""Which code runs: so that two machines with different checkouts are noticed, and a checkpoint names its maker."""

import hashlib
from pathlib import Path

import rwkv_train
from rwkv_train.assets import find_asset_folder

_PACKAGE = Path(rwkv_train.__file__).resolve().parent

_PACKAGE_FILES = ("*.py",)
_KERNEL_FILES = ("*.cu", "*.cuh", "*.cpp", "*.h")
_DIGITS = 12


def code_version() -> str:
    """Return the version and a short hash of all sources, ``"0.1.0+3f2a91c07b5d"``; a few milliseconds.

    Raises:
        RwkvTrainError: the folder of kernels is missing from this installation.
    """
    digest = hashlib.sha256()
    for folder, patterns in ((_PACKAGE, _PACKAGE_FILES), (find_asset_folder("cuda"), _KERNEL_FILES)):
        for path in sorted({path for pattern in patterns for path in folder.rglob(pattern)}):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(b"\0")
            digest.update(path.read_bytes())
            digest.update(b"\0")
    return f"{rwkv_train.__version__}+{digest.hexdigest()[:_DIGITS]}"
