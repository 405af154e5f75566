import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiertcn.graph.coded_log import NumberedIds
from hiertcn.items.hashing import xxh64

batches = st.lists(st.lists(st.text("ab\0é日", max_size=4), max_size=20), max_size=4)


@pytest.mark.parametrize("collide", [False, True])
@given(batches=batches)
def test_ids_are_numbered_as_first_seen_and_listed_by_text_even_if_all_hashes_are_equal(
    batches, collide
):
    numbered, expected = NumberedIds(), {}
    for batch in batches:
        ids = pa.array(batch, pa.large_string())
        hashes = np.zeros(len(ids), np.uint64) if collide else xxh64(ids)
        numbers = [expected.setdefault(text, len(expected)) for text in batch]
        assert numbered.number(ids, hashes).tolist() == numbers
    ids, numbers, hashes = numbered.in_text_order()
    in_order = sorted(expected, key=str.encode)
    assert ids.to_pylist() == in_order
    assert numbers.tolist() == [expected[text] for text in in_order]
    assert collide or hashes.tolist() == xxh64(ids).tolist()


def test_more_ids_than_were_made_room_for_keep_their_numbers():
    numbered = NumberedIds()
    ids = pa.array([f"item {k}" for k in range(200_000)], pa.large_string())
    for part in (ids.slice(0, 1000), ids, ids.slice(777, 5)):
        found = numbered.number(part, xxh64(part))
        assert found.tolist() == [int(text.as_py()[5:]) for text in part]
