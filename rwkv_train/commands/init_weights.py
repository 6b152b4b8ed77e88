"""``rwkv-train init-weights``: write the weights that a run starts from."""

from pathlib import Path
from typing import Annotated

import typer

from rwkv_train.commands.run import ConfigName, Overrides
from rwkv_train.errors import ConfigError

Output = Annotated[Path, typer.Option(help="The safetensors folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")]


def init_weights(
    config: ConfigName, output: Output, overrides: Overrides = None, overwrite: Overwrite = False
) -> None:
    """Write the initial weights of a run, to evaluate them or to start several runs from them."""
    from rwkv_train.checkpoints import Weights, write_weights
    from rwkv_train.config.load import load_train_config
    from rwkv_train.models.registry import build_model, initialize
    from rwkv_train.tokenizers import load_tokenizer

    settings = load_train_config(config, overrides or [])
    if settings.model.init_from is not None:
        raise ConfigError(
            f"model.init_from ({settings.model.init_from}) is what the run starts from; there is nothing to write "
            "(convert-checkpoint copies it)"
        )
    model = build_model(settings.model)
    initialize(model, settings.trainer.seed)
    tokenizer = load_tokenizer(settings.data.tokenizer).identity
    weights = Weights(settings.model, model.state_dict(), tokenizer, step=0)
    folder = write_weights(output, weights, "safetensors", overwrite=overwrite)
    typer.echo(f"wrote {folder}")
