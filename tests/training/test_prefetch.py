import threading

import pytest

from hiertcn.training.prefetch import prefetched


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_order_and_number_stay(ahead):
    assert list(prefetched(iter(range(50)), ahead)) == list(range(50))
    assert list(prefetched(iter(()), ahead)) == []


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_comes_at_its_place(ahead):
    def broken():
        yield 1
        yield 2
        raise ValueError("third")

    seen = []
    with pytest.raises(ValueError, match="third"):
        for item in prefetched(broken(), ahead):
            seen.append(item)
    assert seen == [1, 2]


def test_a_closed_reader_ends_the_thread_and_no_more_than_asked_is_made():
    made = []

    def endless():
        while True:
            made.append(len(made))
            yield made[-1]

    before = threading.active_count()
    reader = prefetched(endless(), 2)
    assert [next(reader) for _ in range(5)] == [0, 1, 2, 3, 4]
    reader.close()
    assert threading.active_count() == before
    # Five read, two waiting, one in hand.
    assert len(made) <= 8
