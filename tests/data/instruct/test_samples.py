from collections import Counter

from rwkv_train.data.instruct.samples import ConversationOrder


def test_datasets_are_mixed_by_weight_and_each_is_read_once_an_epoch():
    order = ConversationOrder([6, 4], [3.0, 1.0], seed=5)
    drawn = [order.locate(sample) for sample in range(16)]

    assert Counter(dataset for dataset, _ in drawn) == {0: 12, 1: 4}
    assert order.drawn(16) == (12, 4)
    first = [number for dataset, number in drawn if dataset == 0]
    assert sorted(first[:6]) == sorted(first[6:]) == list(range(6))
    assert first[:6] != first[6:]
    assert sorted(number for dataset, number in drawn if dataset == 1) == [0, 1, 2, 3]


def test_the_order_is_a_function_of_the_seed():
    drawn = {seed: [ConversationOrder([50], [1.0], seed).locate(n) for n in range(50)] for seed in (1, 2)}
    assert drawn[1] == [ConversationOrder([50], [1.0], 1).locate(n) for n in range(50)]
    assert drawn[1] != drawn[2]
