import pytest
from pydantic import ValidationError

from rwkv_train.config.data import DataConfig
from rwkv_train.data.sampler import ORDERS


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_the_sampler_is_a_setting(order):
    assert DataConfig(order=order).order == order


def test_an_unknown_order_is_refused():
    with pytest.raises(ValidationError, match="'shuffled', 'sequential' or 'official'"):
        DataConfig(order="random")
