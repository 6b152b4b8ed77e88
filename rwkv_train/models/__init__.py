"""The RWKV architectures: one file a version, everything else once."""
