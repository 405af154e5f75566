import dataclasses
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiertcn.serving.records.record import (
    NO_RELEASE,
    CorruptRecordError,
    UserRecord,
    decode,
    encode,
    idempotency_hash,
    new_record,
    user_key,
)

times = st.integers(min_value=0, max_value=2**53)
ids = st.text(min_size=1, max_size=20).filter(lambda text: _encodable(text))
entries = st.lists(st.tuples(ids, st.integers(-1, 2**31 - 1), times, st.booleans()), max_size=20)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def make_record(found) -> UserRecord:
    record = dataclasses.replace(
        new_record(np.arange(12, dtype=np.float32).reshape(2, 6)),
        release=2026010101,
        revision=7,
        watermark_us=5,
        folded_until_us=-3,
        history_item_rows=np.array([4, 5], np.int32),
        history_timestamps_us=np.array([1, 2]),
    )
    journal = record.journal
    for place, (item_id, row, time_us, late) in enumerate(found):
        journal = journal.inserted(item_id, row, time_us, late=late, key=place)
    return dataclasses.replace(record, journal=journal)


def assert_same(one: UserRecord, other: UserRecord) -> None:
    for field in dataclasses.fields(UserRecord):
        if field.name == "journal":
            continue
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))
    for name in ("timestamps_us", "item_rows", "late", "keys", "id_offsets"):
        np.testing.assert_array_equal(getattr(one.journal, name), getattr(other.journal, name))
    assert one.journal.item_ids == other.journal.item_ids


@given(entries)
def test_a_record_survives_its_encoding(found):
    record = make_record(found)
    assert_same(decode(encode(record)), record)


@given(entries)
def test_a_journal_is_sorted_by_time_then_arrival(found):
    journal = make_record(found).journal
    expected = sorted(found, key=lambda entry: entry[2])
    assert journal.item_ids == [entry[0] for entry in expected]
    assert journal.timestamps_us.tolist() == [entry[2] for entry in expected]
    assert journal.item_rows.tolist() == [entry[1] for entry in expected]
    assert journal.late.tolist() == [entry[3] for entry in expected]


@given(entries, st.integers(0, 20))
def test_dropping_the_oldest_keeps_the_rest(found, count):
    journal = make_record(found).journal
    count = min(count, len(journal))
    assert journal.without_first(count).item_ids == journal.item_ids[count:]


def test_contains_looks_for_item_and_time_or_key():
    journal = make_record([("a", 1, 10, False), ("b", 2, 10, False), ("c", 3, 11, False)]).journal
    assert journal.contains("b", 10, 0)
    assert not journal.contains("b", 11, 0)
    assert not journal.contains("d", 10, 0)
    assert journal.contains("d", 99, 2)


@given(entries, st.data())
def test_any_flipped_bit_is_noticed(found, data):
    stored = bytearray(encode(make_record(found)))
    bit = data.draw(st.integers(0, len(stored) * 8 - 1))
    stored[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptRecordError):
        decode(bytes(stored))


@given(entries, st.data())
def test_any_cut_is_noticed(found, data):
    stored = encode(make_record(found))
    with pytest.raises(CorruptRecordError):
        decode(stored[: data.draw(st.integers(0, len(stored) - 1))])


def test_a_record_of_the_format_without_histories_keeps_its_journal_and_asks_for_a_rebuild():
    record = make_record([("a", 1, 10, False), ("b", 2, 11, True)])
    stored = bytearray(encode(record))
    stored[4] = 1
    stored[:4] = struct.pack("<I", zlib.crc32(bytes(stored[4:])))
    found = decode(bytes(stored))
    assert found.release == NO_RELEASE
    assert_same(dataclasses.replace(found, release=record.release), record)


def test_keys_are_short_and_differ():
    assert len(user_key("x" * 5000)) == 16
    assert user_key("ada") != user_key("bob")
    assert idempotency_hash("") == 0
    assert idempotency_hash("a") != idempotency_hash("b")
