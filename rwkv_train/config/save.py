"""From settings back to plain values, for checkpoints, logs and ``--dry-run``."""

from typing import Any

import yaml

from rwkv_train.config.base import Config


def to_tree(config: Config) -> dict[str, Any]:
    """Return ``config`` as nested mappings of JSON's types; :func:`check_tree` reads them back."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """Return ``config`` as the text of a YAML file."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)
