"""Where the folders that are not Python packages lie: ``configs/`` and ``cuda/``.

In a checkout they stand beside the package; in an installed wheel they are inside it, under another name.
"""

from pathlib import Path

from rwkv_train.errors import RwkvTrainError

_PACKAGE = Path(__file__).resolve().parent


def find_asset_folder(name: str) -> Path:
    """Return the folder ``name`` (``"configs"`` or ``"cuda"``) of this installation.

    Raises:
        RwkvTrainError: it is in neither of the two places, both of which the message names.
    """
    in_checkout = _PACKAGE.parent / name
    in_wheel = _PACKAGE / f"_{name}"
    # pyproject.toml tells our checkout from a stranger's folder beside an installed package.
    if (_PACKAGE.parent / "pyproject.toml").is_file() and in_checkout.is_dir():
        return in_checkout
    if in_wheel.is_dir():
        return in_wheel
    raise RwkvTrainError(
        f"the folder '{name}' of rwkv-train is missing: it is neither at {in_checkout} (a checkout) nor at "
        f"{in_wheel} (an installed wheel); reinstall rwkv-train"
    )
