"""The tokenizer that belongs to weights: the one they name, or the one the user gives, checked."""

from rwkv_train.checkpoints.weights import Weights
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import Tokenizer, load_tokenizer


def choose_tokenizer(weights: Weights, name: str | None = None) -> Tokenizer:
    """Load the tokenizer of a model.

    Args:
        weights: the model's weights; what they say of their tokenizer must be true of the loaded one.
        name: as for :func:`load_tokenizer`; ``None``: the one that the weights name.

    Raises:
        DataError: nothing names a tokenizer, it cannot be loaded, it is not the one that the model was
            trained with, or it has more tokens than the model.
    """
    trained_with = weights.tokenizer
    if name is None:
        if trained_with is None:
            raise DataError(
                "the checkpoint does not say with which tokenizer it was trained; name it with --tokenizer: "
                "'bytes', 'world', 'neox' or the path of a tokenizer.json"
            )
        name = trained_with.name
    tokenizer = load_tokenizer(name)
    identity = tokenizer.identity
    if trained_with is not None and not identity.matches(trained_with):
        raise DataError(
            f"the tokenizer '{identity.name}' (sha256 {identity.sha256[:16]}) is not the one the model was trained "
            f"with: '{trained_with.name}' (sha256 {trained_with.sha256[:16]})"
        )
    if tokenizer.vocab_size > weights.config.vocab_size:
        raise DataError(
            f"the tokenizer '{identity.name}' has {tokenizer.vocab_size} tokens, more than the model's "
            f"{weights.config.vocab_size}: the model was trained with another one"
        )
    return tokenizer
