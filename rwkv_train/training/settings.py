"""The settings of a run that may start from given weights, whose sizes they then are."""

from collections.abc import Sequence

from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.config.load import Tree, check_finetune_tree, check_tree, fill_sizes, read_tree
from rwkv_train.config.save import to_tree
from rwkv_train.config.train import TrainConfig
from rwkv_train.errors import CheckpointError, ConfigError


def load_settings(config: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read and check the settings of a run; ``model.init_from`` gives the sizes that the file leaves out.

    Args:
        config: path of a YAML file, or the name of a shipped preset.
        overrides: ``"section.name=value"``; see :func:`rwkv_train.config.load.read_tree`.

    Raises:
        ConfigError: a setting is unknown, has the wrong type, or contradicts others or the weights.
        CheckpointError: the weights cannot be read.
    """
    tree = read_tree(config, overrides)
    model = tree.get("model")
    if isinstance(model, dict) and model.get("init_from") is not None:
        tree = fill_sizes(tree, _sizes_of_weights(str(model["init_from"]), tree.get("trainer")))
    return check_tree(tree)


def load_finetune_settings(config: str, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read and check the settings of a finetuning run; ``model.init_from`` gives the architecture and the sizes.

    Args:
        config: path of a YAML file, or the name of a preset of ``configs/finetune``.
        overrides: as :func:`load_settings`.

    Raises:
        ConfigError: as :func:`load_settings`; or nothing says from which weights to start.
        CheckpointError: the weights cannot be read.
    """
    settings, unreadable = read_finetune_settings(config, overrides)
    if unreadable is not None:
        raise unreadable
    return settings


def read_finetune_settings(
    config: str, overrides: Sequence[str] = ()
) -> tuple[FinetuneConfig, CheckpointError | None]:
    """Do what :func:`load_finetune_settings` does, but return why the weights cannot be read.

    Then ``model`` has made-up sizes, and the other sections are as they are.

    Raises:
        ConfigError: as there; all problems are named.
    """
    tree = read_tree(config, overrides, of_finetuning=True)
    model = tree.get("model")
    init_from = model.get("init_from") if isinstance(model, dict) else None
    if not isinstance(init_from, str):
        missing = ConfigError(
            f"model.init_from is {init_from!r}; set it to the weights to finetune, a path or hf:OWNER/NAME/FILE"
        )
        raise _joined(missing, _with_made_up_model(tree))
    try:
        sizes = _sizes_of_weights(init_from, tree.get("trainer"))
    except CheckpointError as error:
        return check_finetune_tree(_with_made_up_model(tree)), error
    try:
        whole = fill_sizes(tree, sizes)
    except ConfigError as error:
        raise _joined(error, {**tree, "model": {**tree["model"], **sizes}}) from None
    return check_finetune_tree(whole), None


def _with_made_up_model(tree: Tree) -> Tree:
    """Return settings whose model is one of no weights, so that the other sections can be checked."""
    model = tree.get("model")
    kept = {"ctx_len": model["ctx_len"]} if isinstance(model, dict) and "ctx_len" in model else {}
    init_from = str(model.get("init_from")) if isinstance(model, dict) else "nothing"
    return {**tree, "model": {"arch": "rwkv7", "n_layer": 1, "n_embd": 64, "init_from": init_from, **kept}}


def _joined(error: ConfigError, tree: Tree) -> ConfigError:
    """Add what else is wrong with settings to a problem of theirs."""
    try:
        check_finetune_tree(tree)
    except ConfigError as others:
        return ConfigError(f"{error}; {others}")
    return error


def _sizes_of_weights(init_from: str, trainer: object) -> Tree:
    """The sizes of ``model.init_from``: a run that started from it needs the file no more to go on."""
    # These load torch, and a misspelt setting should be answered at once.
    from rwkv_train.checkpoints.manifest import read_manifest  # noqa: PLC0415
    from rwkv_train.checkpoints.run_folder import list_training_checkpoints  # noqa: PLC0415
    from rwkv_train.checkpoints.weights import read_weights  # noqa: PLC0415

    out_dir = trainer.get("out_dir") if isinstance(trainer, dict) else None
    for folder in list_training_checkpoints(out_dir) if isinstance(out_dir, str) else []:
        try:
            manifest = read_manifest(folder)
        except CheckpointError:  # a run goes on from another one, too
            continue
        if manifest["config"]["model"].get("init_from") == init_from:
            sizes: Tree = manifest["arch_config"]
            return sizes
    return to_tree(read_weights(init_from).config)
