"""Folders of Hugging Face's libraries: transformers, flash-linear-attention, and the ``RWKV/`` repositories."""

from rwkv_train.checkpoints.hugging_face.layouts import LayoutName
from rwkv_train.checkpoints.hugging_face.reading import HfModel, read_hugging_face
from rwkv_train.checkpoints.hugging_face.tokenizer_files import (
    TOKENIZER_FILES,
    TokenizerFiles,
    tokenizer_files,
)
from rwkv_train.checkpoints.hugging_face.writing import HfLayout, hugging_face_layout

__all__ = [
    "TOKENIZER_FILES",
    "HfLayout",
    "HfModel",
    "LayoutName",
    "TokenizerFiles",
    "hugging_face_layout",
    "read_hugging_face",
    "tokenizer_files",
]
