import pytest
from pydantic import ValidationError

from rwkv_train.config.checkpoint import CheckpointConfig


@pytest.mark.parametrize(("gigabytes", "n_bytes"), [(4.0, 4_000_000_000), (0.5, 500_000_000), (1e-12, 1)])
def test_a_gigabyte_is_a_thousand_million_bytes(gigabytes, n_bytes):
    assert CheckpointConfig(max_file_gb=gigabytes).max_file_bytes == n_bytes


@pytest.mark.parametrize(
    "name", ["every_n_steps", "every_n_minutes", "keep_last", "keep_every_n_steps", "max_file_gb"]
)
def test_no_interval_count_or_size_is_zero(name):
    with pytest.raises(ValidationError, match="greater than 0"):
        CheckpointConfig(**{name: 0})


def test_the_largest_size_of_a_file_is_a_whole_number_of_bytes():
    assert CheckpointConfig(max_file_gb=1e9).max_file_bytes == 10**18
    with pytest.raises(ValidationError, match="less than or equal"):
        CheckpointConfig(max_file_gb=1e300)
