"""The files of a model's tokenizer in a Hugging Face folder, from what is installed here: nothing is downloaded."""

import json
from collections.abc import Mapping
from typing import NamedTuple

from rwkv_train.checkpoints.hugging_face.longest_match import END_OF_DOCUMENT, longest_match_json
from rwkv_train.errors import DataError
from rwkv_train.tokenizers import Tokenizer, TokenizerIdentity, load_tokenizer
from rwkv_train.tokenizers.loading import find_cached_neox_file

WORLD_FILE = "rwkv_vocab_v20230424.txt"
"""Name of the published World vocabulary, which llama.cpp and the code in the ``RWKV/`` repositories ask for."""

TOKENIZER_FILES = frozenset({"tokenizer.json", "tokenizer_config.json", WORLD_FILE})
"""Names of the files that a folder may have for its tokenizer."""

_WORLD_ROWS = 65_536
"""Rows of the embedding of every published model with the World vocabulary."""


class TokenizerFiles(NamedTuple):
    """What goes into a folder for its tokenizer."""

    files: Mapping[str, bytes]
    """Name -> content; empty where there is no tokenizer."""
    end_of_document: int
    """Token id that ends a document; 0, which is RWKV's own, where there is no tokenizer."""
    note: str | None
    """What a user should know: that a tokenizer was assumed, or why there is none."""


def tokenizer_files(identity: TokenizerIdentity | None, vocab_size: int) -> TokenizerFiles:
    """Return the files with which transformers' ``AutoTokenizer`` gives the ids that the model was trained with.

    A Hugging Face ``tokenizer.json`` is copied. For World and bytes one is made; it differs from ours in that the
    name of token 0 inside a text is that token. World comes with its published file too.

    Args:
        identity: of the model's tokenizer; where it is not known, a model of 65536 tokens is taken for one with
            the World vocabulary, as all published ones have.
        vocab_size: of the model.
    """
    # Not at the top: who only reads weights should not wait for tokenizers.
    from rwkv_train.tokenizers.huggingface import HuggingFaceTokenizer  # noqa: PLC0415
    from rwkv_train.tokenizers.world import WorldTokenizer  # noqa: PLC0415

    note = None
    if identity is None:
        if vocab_size != _WORLD_ROWS:
            return _none("the weights do not say which tokenizer they were trained with")
        note = f"taken for a model with the World vocabulary, since it has {_WORLD_ROWS} tokens"
    name = "world" if identity is None else identity.name
    try:
        tokenizer = _load(name)
    except DataError as error:
        return _none(str(error))
    if identity is not None and not tokenizer.identity.matches(identity):
        return _none(f"the tokenizer '{name}' that is found here is not the one the model was trained with")
    if isinstance(tokenizer, HuggingFaceTokenizer):
        content = tokenizer.path.read_bytes()
        end = _name_of_token(content, tokenizer.end_of_document)
        files = {"tokenizer.json": content, "tokenizer_config.json": _config(end)}
    else:
        pieces = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]
        files = {
            "tokenizer.json": longest_match_json(pieces).encode(),
            "tokenizer_config.json": _config(END_OF_DOCUMENT),
        }
    if isinstance(tokenizer, WorldTokenizer):
        files[WORLD_FILE] = tokenizer.vocabulary
    return TokenizerFiles(files, tokenizer.end_of_document, note)


def _none(reason: str) -> TokenizerFiles:
    return TokenizerFiles({}, 0, f"no files of a tokenizer: {reason}")


def _load(name: str) -> Tokenizer:
    if name != "neox":
        return load_tokenizer(name)
    path = find_cached_neox_file()
    if path is None:
        raise DataError(
            "the tokenizer 'neox' is not in the Hugging Face cache, and nothing is downloaded for it"
        )
    from rwkv_train.tokenizers.huggingface import HuggingFaceTokenizer  # noqa: PLC0415

    return HuggingFaceTokenizer(path, name)


def _config(end_of_document: str) -> bytes:
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_document,
        "eos_token": end_of_document,
        "clean_up_tokenization_spaces": False,
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def _name_of_token(tokenizer_json: bytes, token: int) -> str:
    """The text of an added token of a ``tokenizer.json``."""
    added: list[dict[str, object]] = json.loads(tokenizer_json)["added_tokens"]
    return next(str(entry["content"]) for entry in added if entry["id"] == token)
