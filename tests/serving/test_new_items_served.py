"""New items through the real sidecar on the real Triton: candidates at once, after restarts, flips.

Their vectors are held against the offline encoder on a graph that holds the new items, and scores
against the toy's arithmetic with those vectors.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from hiertcn.cli import app
from hiertcn.errors import InputError, OverloadError, ReleaseError
from hiertcn.export.scoring_terms import export_terms
from hiertcn.items.index import IdIndex
from hiertcn.serving.client import Filter, Interaction, NewItem
from hiertcn.sessions.cut import build_sessions
from hiertcn.sessions.request_features import FEATURES, RequestFeatures
from hiertcn.sessions.store import SessionStore
from hiertcn.sessions.transitions import count_transitions
from models.scoring_terms import ScoringTerms
from tests.serving.toy_item_encoder import (
    ITEMS,
    Encoder,
    Expected,
    exported_encoder,
    random_row,
    write_items,
)
from tests.session_logs import write_events

WITHOUT_ENCODER, FIRST, WITH_TERMS, SECOND = 2026010101, 2026010102, 2026010103, 2026010201
HOUR_US = 3_600_000_000
NOVELTY = NewItem(
    "novelty",
    {"title": "warm green hat", "color": "blue", "image": [0.5, -1.0, 2.0], "price": 3},
    ["item-3", "item-7", "ghost"],
    [3.0, 1.0, 9.0],
)
LONER = NewItem("loner", {"title": "cold light coat", "image": [1.0, 1.0, -1.0]})
# The second release knows this one by itself.
COMING = NewItem(f"item-{ITEMS}", {"color": "black"}, ["item-1"])
NEW = (NOVELTY, LONER, COMING)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Encoder:
    return exported_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def toys(shared_toy, encoder):
    """``shared_toy`` (without an encoder), and two releases that have one."""
    rng = np.random.default_rng(5)
    rows = [random_row(rng, f"item-{n}") for n in range(ITEMS + 1)]
    catalogue = shared_toy.root.with_name("catalogue.parquet")
    write_items(catalogue, rows[:ITEMS])
    for number, items, watermark_us in (
        (FIRST, ITEMS, shared_toy.toys[WITHOUT_ENCODER].watermark_us),
        (SECOND, ITEMS + 1, shared_toy.toys[WITHOUT_ENCODER].watermark_us + HOUR_US),
    ):
        shared_toy.publish(
            number,
            seed=number % 7,
            items=items,
            watermark_us=watermark_us,
            items_file=catalogue,
            extend=encoder.extend(number, rows[:items]),
            activate=False,
        )
    return shared_toy


def _assert_scored(found, expected: dict[str, float], ids=None) -> None:
    assert not found.fallback
    wanted = sorted(ids if ids is not None else expected, key=lambda one: -expected[one])
    assert len(found.items) == min(len(wanted), 1000)
    for item in found.items:
        assert item.score == pytest.approx(expected[item.item_id], abs=2e-3)
    assert {item.item_id for item in found.items} == set(wanted)
    assert (np.diff([item.score for item in found.items]) <= 0).all()


def test_new_items_are_served_through_restarts_and_flips(
    toys, shared_triton, encoder, start_sidecar, tmp_path
):
    toys.repository.activate(FIRST)
    t0 = toys.toys[SECOND].watermark_us + HOUR_US
    running = start_sidecar(toys, shared_triton.grpc_url)
    client = running.client
    client.record([Interaction("early", "novelty", t0)])
    assert client.recommend("ada", candidates=["novelty"]).unknown_items == ["novelty"]

    found = client.upsert_items([NOVELTY, LONER])
    assert (found.release, found.known_items) == (FIRST, [])
    assert (found.without_features, found.unknown_neighbors) == ([], ["ghost"])
    found = client.upsert_items([COMING, NewItem("item-2", {"title": "a new title"})])
    assert (found.known_items, found.without_features) == (["item-2"], [])
    first = Expected(toys, encoder, FIRST, NEW)
    _assert_scored(client.recommend("ada", k=1000, timestamp_us=t0), first.scores(()))
    pool = ["item-4", "novelty", "loner", "item-9"]
    _assert_scored(
        client.recommend("ada", candidates=pool, timestamp_us=t0), first.scores(()), pool
    )
    # What was recorded before the item came is an input from now on.
    early = client.recommend("early", k=1000, timestamp_us=t0)
    _assert_scored(early, first.scores(("novelty",)))
    blue = client.recommend("ada", k=1000, filters=[Filter(column="color", any_of=["blue"])])
    assert "novelty" in {item.item_id for item in blue.items}
    assert "loner" not in {item.item_id for item in blue.items}
    assert "loner" not in {
        item.item_id for item in client.recommend("ada", k=1000, exclude=["loner"]).items
    }

    assert client.record([Interaction("ada", "novelty", t0)]).unknown_items == []
    client.record([Interaction("ada", "item-3", t0 + 1)])
    open_session = client.recommend("ada", k=1000, timestamp_us=t0 + 1)
    _assert_scored(open_session, first.scores(("novelty", "item-3")))
    seen = client.recommend("ada", k=1000, exclude_seen=True, timestamp_us=t0 + 1)
    assert {"novelty", "item-3"}.isdisjoint({item.item_id for item in seen.items})
    closed = client.recommend("ada", k=1000, timestamp_us=t0 + HOUR_US)
    _assert_scored(closed, first.scores((), ("novelty", "item-3")))

    # The log's segments of items alone are dropped when they are exported; the set is saved first.
    running.stop()
    assert (tmp_path / "state" / "new_items.log").exists()
    exported = pq.read_table(tmp_path / "state" / "items").to_pylist()
    assert {row["item_id"] for row in exported} == {"novelty", "loner", "item-50", "item-2"}
    running = start_sidecar(toys, shared_triton.grpc_url)
    client = running.client
    client.record([Interaction("bob", "loner", t0), Interaction("bob", "novelty", t0 + 1)])
    again = client.recommend("ada", k=1000, timestamp_us=t0 + HOUR_US)
    _assert_scored(again, first.scores((), ("novelty", "item-3")))
    _assert_scored(
        client.recommend("bob", k=1000, timestamp_us=t0 + 1), first.scores(("loner", "novelty"))
    )
    assert [entry.item_id for entry in client.get_user("bob").open_session] == ["loner", "novelty"]
    assert all(entry.known_item for entry in client.get_user("bob").journal)

    assert client.activate(SECOND) == SECOND
    second = Expected(toys, encoder, SECOND, (NOVELTY, LONER))
    assert len(second.ids) == len(first.ids)
    flipped = client.recommend("bob", k=1000, timestamp_us=t0 + 1)
    assert flipped.release == SECOND
    _assert_scored(flipped, second.scores(("loner", "novelty")))
    # Rated anew, but the release's own item is the release's own.
    changed = NewItem("loner", {"title": "warm red shoe"}, ["item-50"])
    found = client.upsert_items([changed, COMING])
    assert (found.release, found.known_items) == (SECOND, ["item-50"])
    second = Expected(toys, encoder, SECOND, (NOVELTY, changed))
    _assert_scored(
        client.recommend("bob", k=1000, timestamp_us=t0 + 1), second.scores(("loner", "novelty"))
    )
    assert client.roll_back() == FIRST
    first = Expected(toys, encoder, FIRST, (NOVELTY, changed, COMING))
    # Under the first release nobody knows the neighbor but as a new item.
    _assert_scored(
        client.recommend("ada", k=1000, timestamp_us=t0 + HOUR_US),
        first.scores((), ("novelty", "item-3")),
    )


def test_new_items_have_the_terms_that_the_offline_ranker_gives_them(
    toys, shared_triton, encoder, start_sidecar, tmp_path
):
    """A ranker that has the new items in its catalogue, and a transition table that has not."""
    t0 = toys.toys[SECOND].watermark_us + HOUR_US
    ids = [*toys.toys[FIRST].item_ids, "novelty", "loner"]
    rng = np.random.default_rng(9)
    log = []
    for user in ("ada", "bob", "eve"):
        at = t0 + int(rng.integers(HOUR_US))
        for _ in range(4):
            for _ in range(5):
                log.append(Interaction(user, str(rng.choice([*ids[:4], *ids[-2:]])), at))
                at += int(rng.integers(1, HOUR_US // 10))
            at += HOUR_US
    log.sort(key=lambda one: one.timestamp_us)
    index = IdIndex.build(ids, tmp_path / "index")
    rows = [
        {"user_id": one.user_id, "item_id": one.item_id, "timestamp": one.timestamp_us}
        for one in log
    ]
    build_sessions(write_events(tmp_path / "events", rows), index, tmp_path / "sessions")
    store = SessionStore.open(tmp_path / "sessions")
    transitions = count_transitions(store, ITEMS)
    features = RequestFeatures(
        FEATURES,
        store,
        replace(
            transitions,
            offsets=np.pad(transitions.offsets, (0, 2), mode="edge"),
            totals=np.pad(transitions.totals, (0, 2)),
        ),
    )
    torch.manual_seed(2)
    terms = ScoringTerms(FEATURES)
    torch.nn.init.normal_(terms.gate.weight, std=0.3)
    torch.nn.init.normal_(terms.gate.bias[:-2], mean=2.0)

    def extend(parts: Path) -> dict[str, Path]:
        export_terms(terms, parts / "scoring_terms.safetensors")
        transitions.save(parts / "user_states" / "transitions")
        catalogue = pq.read_table(parts.with_name(f"items-{FIRST}.parquet")).to_pylist()
        return encoder.extend(WITH_TERMS, catalogue)(parts)

    toys.publish(WITH_TERMS, seed=3, items=ITEMS, extend=extend)
    running = start_sidecar(toys, shared_triton.grpc_url)
    client = running.client
    client.upsert_items([NOVELTY, LONER])
    expected = Expected(toys, encoder, WITH_TERMS, (NOVELTY, LONER))
    compared = 0
    for one in log:
        user = int(store.users.rows([one.user_id])[0])
        mine = store.session_offsets[store.user_offsets[user : user + 2]]
        place = int(mine[0] + np.searchsorted(store.timestamps_us[slice(*mine)], one.timestamp_us))
        session = int(np.searchsorted(store.session_offsets, place, side="right")) - 1
        sessions = [
            tuple(ids[row] for row in store.item_rows[begin:end])
            for number in range(int(store.user_offsets[user]), session + 1)
            for begin, end in [store.session_offsets[number : number + 2]]
        ]
        begun = place - int(store.session_offsets[session])
        dots = expected.scores(sessions[-1][:begun], *sessions[:-1])
        found, context = features.of_items(
            np.array([session]), np.array([place]), np.arange(len(ids))
        )
        with torch.inference_mode():
            scores = terms(
                torch.tensor([[dots[one] for one in ids]], dtype=torch.float32),
                torch.from_numpy(context),
                torch.from_numpy(found),
            )[0].tolist()
        wanted = dict(zip(ids, scores, strict=True))
        asked = {"k": 1000, "timestamp_us": one.timestamp_us}
        _assert_scored(client.recommend(one.user_id, **asked), wanted)
        pool = ["item-0", "loner", "item-7", "novelty"]
        _assert_scored(client.recommend(one.user_id, candidates=pool, **asked), wanted, pool)
        compared += bool(found[:, 0, -2:].any())
        client.record([one])
    assert compared > 30


def test_an_item_that_goes_viral_leads_the_ranking_without_the_model(
    toys, shared_triton, start_sidecar
):
    toys.repository.activate(FIRST)
    t0 = toys.toys[SECOND].watermark_us + HOUR_US
    # Hardly a model answers that soon, but the encoder is waited for.
    client = start_sidecar(toys, shared_triton.grpc_url, model_deadline_s=1e-9).client
    client.record([Interaction(f"u{n}", "novelty", t0) for n in range(5)])
    client.upsert_items([NOVELTY])
    client.record([Interaction(f"u{n}", "novelty", t0 + 1) for n in range(5)])
    later = t0 + 120_000_000
    asked = (client.recommend("nobody", k=1, timestamp_us=later) for _ in range(100))
    found = next(one for one in asked if one.fallback)
    assert found.items[0].item_id == "novelty"
    both = client.recommend("nobody", candidates=["item-1", "novelty"], timestamp_us=later)
    assert both.fallback
    assert [item.item_id for item in both.items] == ["novelty", "item-1"]


def test_what_is_wrong_is_named_and_nothing_is_kept(toys, shared_triton, start_sidecar, tmp_path):
    toys.repository.activate(FIRST)
    running = start_sidecar(toys, shared_triton.grpc_url, max_new_items=2)
    client = running.client
    good = NewItem("fine", {"title": "red hat"})
    cases = [
        ([], "items lists 0 items"),
        ([good] * 1001, "items lists 1001 items"),
        ([good, good], r"items\[1\]\.item_id is 'fine', which items\[0\] is too"),
        ([good, NewItem("")], r"items\[1\]\.item_id is empty"),
        ([NewItem("x" * 513)], r"items\[0\]\.item_id has 513 bytes"),
        ([NewItem("a", {"": "x"})], r"items\[0\]\.attributes's name is empty"),
        ([NewItem("a", {"item_id": "x"})], "a field of its own"),
        ([NewItem("a", {"title": "x" * 70_000})], r"attributes\['title'\] has 70000 bytes"),
        ([NewItem("a", {"price": float("nan")})], r"attributes\['price'\] is nan"),
        ([NewItem("a", {"image": [1.0, float("inf"), 0.0]})], r"\['image'\]\[1\] is inf"),
        ([NewItem("a", {"image": []})], r"\['image'\] has 0 numbers"),
        ([NewItem("a", {"image": [1.0]})], r"vector of 1 numbers.*a vector of 3 numbers"),
        ([NewItem("a", {"title": 3})], r"\['title'\] is a number.*text was expected"),
        ([NewItem("a", {"price": "3"})], r"\['price'\] is text.*a number was expected"),
        ([NewItem("a", {"color": ["x"]})], r"\['color'\] is 1 texts.*text was expected"),
        ([NewItem("a", {str(n): 1 for n in range(65)})], r"attributes has 65 entries"),
        ([NewItem("a", {}, ["a"])], r"neighbors\[0\] is 'a', which is the item itself"),
        ([NewItem("a", {}, ["b", "b"])], r"neighbors\[1\] is 'b'"),
        ([NewItem("a", {}, [str(n) for n in range(101)])], r"neighbors lists 101 items"),
        ([NewItem("a", {}, ["b"], [1.0, 2.0])], r"neighbor_weights has 2 weights for 1"),
        ([NewItem("a", {}, ["b"], [0.0])], r"neighbor_weights\[0\] is 0"),
        ([NewItem("a", dict.fromkeys("bcd", "\x01" * 60000))], r"items\[0\] takes \d+ bytes"),
    ]
    for items, said in cases:
        with pytest.raises(InputError, match=said):
            client.upsert_items(items)
    # An attribute that the release does not encode may be anything.
    assert client.upsert_items([NewItem("a", {"made in": "x"})]).without_features == ["a"]
    client.upsert_items([good])
    with pytest.raises(OverloadError, match=r"3 new items, more than the 2 of --max-new-items"):
        client.upsert_items([NewItem("third")])
    client.upsert_items([good, NewItem("item-3", {"title": "known"})])
    running.stop()
    exported = pq.read_table(tmp_path / "state" / "items").to_pylist()
    assert {row["item_id"] for row in exported} == {"a", "fine", "item-3"}


def test_a_release_without_the_encoder_says_so_and_keeps_what_it_was_given(
    toys, shared_triton, start_sidecar
):
    toys.repository.activate(FIRST)
    client = start_sidecar(toys, shared_triton.grpc_url).client
    client.upsert_items([LONER])
    client.activate(WITHOUT_ENCODER)
    assert client.recommend("ada", candidates=["loner"]).unknown_items == ["loner"]
    with pytest.raises(ReleaseError, match="2026010101 has no item encoder"):
        client.upsert_items([NOVELTY])
    client.roll_back()
    assert client.recommend("ada", candidates=["loner"]).unknown_items == []


def test_the_command_takes_files_and_single_items(toys, shared_triton, start_sidecar, tmp_path):
    toys.repository.activate(FIRST)
    running = start_sidecar(toys, shared_triton.grpc_url)
    command = ["items", "upsert", "--address", running.sidecar.address, "--json"]

    def run(*arguments: str, stdin: str | None = None) -> dict:
        found = CliRunner().invoke(app, [*command, *arguments], input=stdin, catch_exceptions=False)
        assert found.exit_code == 0, found.output
        return json.loads(found.output)

    lines = [
        {"item_id": "one", "attributes": {"title": "red hat", "image": [1, 2, 3], "price": 2}},
        {"item_id": 7, "neighbors": ["item-1", "nobody"], "neighbor_weights": [1, 2]},
    ]
    told = run("-", stdin="".join(json.dumps(line) + "\n" for line in lines))
    assert told == {
        "release": FIRST,
        "items": 2,
        "known_items": [],
        "without_features": ["7"],
        "unknown_neighbors": ["nobody"],
    }
    catalogue = write_items(
        tmp_path / "more.parquet", [random_row(np.random.default_rng(0), "more")]
    )
    assert run(str(catalogue))["items"] == 1
    given = ("--item", "single", "--attribute", "title=red hat", "--attribute", "image=[1, 2, 3]")
    assert run(*given, "--neighbor", "item-2")["without_features"] == []
    ids = ["one", "7", "more", "single"]
    assert running.client.recommend("ada", candidates=ids).unknown_items == []
    for arguments, said in (
        ((), "exactly one of the two"),
        (("x.jsonl", "--item", "a"), "exactly one of the two"),
        (("--item", "a", "--attribute", "title"), "expected NAME=VALUE"),
        ((str(tmp_path / "absent.jsonl"),), r"absent\.jsonl cannot be read"),
        ((str(tmp_path / "absent.parquet"),), r"absent\.parquet cannot be read as parquet"),
    ):
        with pytest.raises(InputError, match=said):
            run(*arguments)
    for line, said in (
        ("{", "line 1 is not JSON"),
        ('{"item_id": "a", "color": "red"}', "line 1 has the unknown field 'color'"),
        ('{"item_id": ""}', "expected a text or integer id"),
        ('{"item_id": "a", "attributes": {"x": {}}}', r"attributes\['x'\] is dict"),
    ):
        with pytest.raises(InputError, match=said):
            run("-", stdin=line)
