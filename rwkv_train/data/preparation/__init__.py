"""The steps from text to a corpus on disk: read, tokenize, choose, write. :mod:`rwkv_train.data.prepare` joins them."""
