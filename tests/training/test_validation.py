"""The held-out loss during a run."""

import numpy as np
import pytest

from rwkv_train.data.binidx import TokenFileWriter
from rwkv_train.errors import DataError
from rwkv_train.training.run import run_pretraining


def test_a_corpus_without_text_is_refused_before_training(settings, tmp_path):
    with TokenFileWriter(tmp_path / "bare", np.uint16) as writer:
        for _ in range(50):
            writer.add_document(np.zeros(1, np.uint16))  # nothing but the end of a document
    with pytest.raises(DataError, match=r"data\.valid .* has no document with text"):
        run_pretraining(settings({"data.valid": str(tmp_path / "bare")}))
