"""The model that a run starts from."""

from rwkv_train.checkpoints.weights import Weights, read_weights
from rwkv_train.config.finetune import FinetuneConfig
from rwkv_train.errors import ConfigError
from rwkv_train.tokenizers import Tokenizer


def read_base(config: FinetuneConfig, tokenizer: Tokenizer) -> Weights:
    """Read ``model.init_from``, whose tokenizer must be that of the data.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it has another tokenizer, or fewer tokens than the tokenizer.
    """
    path = config.model.init_from
    assert path is not None  # the settings class holds that it is set
    weights = read_weights(path)
    trained_with = weights.tokenizer
    if trained_with is not None and not trained_with.matches(tokenizer.identity):
        raise ConfigError(
            f"model.init_from ({path}) was trained with the tokenizer '{trained_with.name}', but data.tokenizer is "
            f"'{tokenizer.identity.name}'; use the same one"
        )
    if tokenizer.vocab_size > weights.config.vocab_size:
        raise ConfigError(
            f"data.tokenizer '{tokenizer.identity.name}' has {tokenizer.vocab_size} tokens, more than the "
            f"{weights.config.vocab_size} of model.init_from ({path}), which was trained with another one; name that"
        )
    return weights
