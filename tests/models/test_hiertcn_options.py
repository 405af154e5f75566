"""The laws of the network hold for every option of HierTCN."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from hiertcn.errors import InputError
from hiertcn.sessions.batches import SessionBatches
from hiertcn.training.lanes import to_tensors
from hiertcn.training.session_model import SessionContext
from hiertcn.training.user_embeddings import embed_before, states_before
from models.dropout import Dropout
from models.hiertcn import HierTCN, HierTCNConfig, load_hiertcn, save_hiertcn
from models.hiertcn_serving import GruStep, TcnCone
from models.session_layouts import PackedLayout
from models.tcn import TCN
from tests.session_logs import random_users, write_store, write_table

ITEMS, DIM = 20, 6
EVENT_TYPES = ("click", "save")
CONFIG = HierTCNConfig(
    item_dim=DIM, hidden=8, gru_layers=2, tcn_blocks=2, kernel=3, filters=10, dropout=0.1
)
OPTIONS = {
    "init": {"connection": "init"},
    "last": {"aggregate": "last"},
    "weighted": {"aggregate": "weighted"},
    "batch norm": {"batch_norm": True},
    "time gaps": {"time_gaps": True},
    "event types": {"event_types": EVENT_TYPES},
    "all": {
        "connection": "init",
        "aggregate": "last",
        "batch_norm": True,
        "time_gaps": True,
        "event_types": EVENT_TYPES,
        "input_dropout": 0.2,
    },
    "weighted with gaps": {"aggregate": "weighted", "time_gaps": True},
}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    users = random_users(np.random.default_rng(0), users=12, items=ITEMS, length=25)
    store = write_store(directory, users, ITEMS, ["click", "save", "click", None, "click"])
    return store, write_table(directory / "table", ITEMS, DIM)


def context_of_one(gaps, pause, *, step=0, types=None):
    """Return the context of one uncut session."""
    return SessionContext(
        torch.as_tensor(gaps),
        torch.tensor([pause]),
        torch.zeros(1, dtype=torch.int64),
        torch.tensor([step]),
        torch.zeros(len(gaps), dtype=torch.int64) if types is None else torch.as_tensor(types),
    )


def batches_of(store, model, **sizes):
    given = {"lanes": 4, "sessions_per_step": 3, "max_length": 7, **sizes}
    return SessionBatches(store, context=model.receptive_field, **given)


def build(log, name, layout="auto"):
    """Return a model of the options whose weights and statistics are not those it began with."""
    torch.manual_seed(0)
    model = HierTCN(dataclasses.replace(CONFIG, **OPTIONS[name]), layout)
    if model.item_scores is not None:
        torch.nn.init.normal_(model.item_scores.weight)
    model.train()
    state = model.initial_state(4)
    with torch.no_grad():
        for batch in batches_of(log[0], model).epoch(0):
            _, state = model(to_tensors(batch, log[1]), state)
    return model.eval()


@torch.inference_mode()
def embeddings_by_user(model, store, table):
    """Return u before every interaction, one user and one session at a time, uncut."""
    out = np.zeros((store.meta.interactions, DIM), np.float32)
    moments = store.timestamps_us
    for user in range(store.meta.users):
        state = model.initial_state(1)
        for session in range(store.user_offsets[user], store.user_offsets[user + 1]):
            first, end = store.session_offsets[session], store.session_offsets[session + 1]
            gaps = np.diff(moments[first:end], prepend=moments[first])
            is_first = session == store.user_offsets[user]
            pause = -1 if is_first else moments[first] - moments[first - 1]
            times = context_of_one(
                gaps,
                pause,
                step=session - store.user_offsets[user],
                types=store.event_types[first:end].astype(np.int64),
            )
            items = torch.from_numpy(table.gather(store.item_rows[first:end]))
            lengths = torch.tensor([len(items)])
            out[first:end] = model.encode(items, lengths, state[:, -1], times)[:-1].numpy()
            state = model.fold_items(state, items, lengths, times)
    return out


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("lanes", "max_length"), [(1, 200), (5, 7)])
def test_lanes_pieces_and_neighbours_change_nothing(log, name, lanes, max_length):
    store, table = log
    model = build(log, name)
    state = model.initial_state(lanes)
    found = np.full((store.meta.interactions, DIM), np.nan, np.float32)
    with torch.inference_mode():
        for batch in batches_of(store, model, lanes=lanes, max_length=max_length).epoch(0):
            tensors = to_tensors(batch, table)
            u, state = model(tensors, state)
            found[tensors.interactions] = u.numpy()
    expected = embeddings_by_user(model, store, table)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    interactions = np.arange(store.meta.interactions)
    sessions = np.searchsorted(store.session_offsets, interactions, side="right") - 1
    offline = embed_before(model, store, table, sessions, interactions)
    np.testing.assert_allclose(offline.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_streaming_is_the_whole_session_and_sees_nothing_later(log, name):
    model = build(log, name)
    items, state = torch.randn(30, DIM), torch.randn(1, CONFIG.hidden)
    times = context_of_one(torch.arange(30) * 7_000_000, 10**9, types=torch.arange(30) % 3)
    with torch.inference_mode():
        whole = model.encode(items, torch.tensor([30]), state, times)
        for seen in range(31):
            so_far = context_of_one(times.gaps_us[:seen], 10**9, types=times.event_types[:seen])
            newest = model.encode(items[:seen], torch.tensor([seen]), state, so_far)[-1]
            torch.testing.assert_close(newest, whole[seen], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_packed_equals_padded(log, name):
    packed, padded = (build(log, name, layout) for layout in ("packed", "padded"))
    padded.load_state_dict(packed.state_dict())
    for model in (packed, padded):
        model.zero_grad()
        # Dropout draws for other shapes; statistics of a batch are what is compared.
        model.train()
        for part in model.modules():
            if isinstance(part, Dropout):
                part.eval()
    results = []
    for model in (packed, padded):
        batch = to_tensors(next(batches_of(log[0], model).epoch(1)), log[1])
        u, state = model(batch, model.initial_state(4))
        (u.square().sum() + state.sum()).backward()
        results.append((u, state, [p.grad for p in model.parameters()], list(model.buffers())))
    for one, other in zip(*(result[:2] for result in results), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    for index in (2, 3):
        for one, other in zip(results[0][index], results[1][index], strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_half_precision_keeps_states_and_nearly_the_outputs(log, name, layout):
    model = build(log, name, layout)
    batch = to_tensors(next(batches_of(log[0], model).epoch(0)), log[1])
    u, state = model(batch, model.initial_state(4))
    # The CPU's autocast takes the same paths as CUDA's.
    with torch.autocast("cpu", torch.bfloat16):
        near, near_state = model(batch, model.initial_state(4))
    near.float().sum().backward()
    assert near_state.dtype == torch.float32
    for half, full in ((near.float(), u), (near_state, state)):
        # Batch normalisation magnifies what rounding leaves of nearly constant channels.
        assert (half - full).abs().mean() < (0.3 if model.config.batch_norm else 0.05) * (
            full.abs().mean()
        )


def test_without_its_state_connection_it_is_a_tcn_over_sessions():
    torch.manual_seed(1)
    model = HierTCN(CONFIG).eval()
    alone = TCN(DIM, CONFIG.filters, CONFIG.kernel, [1, 2]).eval()
    weights = model.tcn.state_dict()
    with torch.no_grad():
        first = model.tcn.blocks[0]
        first.first.weight[:, DIM:] = 0.0
        first.residual.weight[:, DIM:] = 0.0
        weights = {**model.tcn.state_dict()}
        weights["blocks.0.first.weight"] = weights["blocks.0.first.weight"][:, :DIM]
        weights["blocks.0.residual.weight"] = weights["blocks.0.residual.weight"][:, :DIM]
        alone.load_state_dict(weights)
        lengths = torch.tensor([3, 0, 9])
        items = torch.randn(12, DIM)
        parts = [torch.cat([model.start_item[None], part]) for part in items.split([3, 0, 9])]
        expected = model.head(alone(torch.cat(parts), PackedLayout(lengths + 1)))
        u = model.encode(items, lengths, torch.randn(3, CONFIG.hidden))
    torch.testing.assert_close(u, expected, atol=1e-6, rtol=1e-5)


def test_init_reaches_all_positions_through_the_start_token_alone(log):
    model = build(log, "init")
    items, lengths = torch.randn(30, DIM), torch.tensor([30])
    u, other = (
        model.encode(items, lengths, torch.full((1, CONFIG.hidden), value)) for value in (0.0, 1.0)
    )
    differs = (u - other).abs().amax(1) > 1e-7
    field = model.receptive_field
    assert differs[: field // 2].all() and not differs[field:].any()


def test_the_last_hidden_vector_and_the_weights_depend_on_what_they_should(log):
    torch.manual_seed(0)
    items, lengths = torch.randn(5, DIM), torch.tensor([5])
    turned = items.flip(0)
    for name, order_matters in (("weighted", False), ("last", True)):
        model = build(log, name)
        state = model.initial_state(1)
        one, other = (model.fold_items(state, x, lengths) for x in (items, turned))
        assert torch.allclose(one, other, atol=1e-5) != order_matters
    # Equal scores weigh all items the same.
    weighted = build(log, "weighted")
    torch.nn.init.zeros_(weighted.item_scores.weight)
    folded = weighted.fold_items(weighted.initial_state(1), items, lengths)
    torch.testing.assert_close(
        folded, weighted.gru(weighted.initial_state(1), items.mean(0, keepdim=True))
    )


def test_times_change_what_is_scored_and_are_asked_for(log):
    model = build(log, "time gaps")
    items, lengths, state = torch.randn(2, DIM), torch.tensor([2]), torch.zeros(1, CONFIG.hidden)
    minute, day = 60_000_000, 86_400_000_000
    near, far, paused = (
        model.encode(items, lengths, state, context_of_one(g, p))
        for g, p in (([0, minute], day), ([0, day], day), ([0, minute], 9 * day))
    )
    same = torch.isclose(near, far, atol=1e-7).all(1)
    assert same.tolist() == [True, True, False]
    assert not torch.isclose(near[0], paused[0], atol=1e-7).all()
    with pytest.raises(InputError, match="time_gaps"):
        model.encode(items, lengths, state)
    with pytest.raises(InputError, match="time_gaps"):
        model.fold_items(model.initial_state(1), items, lengths)
    with pytest.raises(InputError, match="does not fold a mean"):
        model.gru_step(model.initial_state(1), items[:1])


@pytest.mark.parametrize("name", OPTIONS)
def test_saving_keeps_scores_and_serving_refuses_by_name(log, tmp_path, name):
    store, table = log
    model = build(log, name)
    save_hiertcn(model, tmp_path)
    loaded = load_hiertcn(tmp_path)
    assert loaded.config == model.config
    sessions = np.arange(store.meta.sessions)
    states = [states_before(part, store, table, sessions) for part in (model, loaded)]
    assert torch.equal(*states)
    option = next(iter(OPTIONS[name]))
    for part in (TcnCone, GruStep):
        with pytest.raises(InputError, match=f"HierTCNConfig.{option}"):
            part(model)


def test_options_are_checked_and_the_papers_setting_has_a_name():
    for field, value in (
        ("connection", "half"),
        ("aggregate", "max"),
        ("head", "cubic"),
        ("input_dropout", 1.0),
    ):
        with pytest.raises(InputError, match=field):
            HierTCNConfig(item_dim=4, **{field: value})
    with pytest.raises(InputError, match="layout"):
        HierTCN(CONFIG, "ragged").encode(
            torch.zeros(0, DIM), torch.tensor([0]), torch.zeros(1, CONFIG.hidden)
        )
    paper = HierTCNConfig.paper(129)
    assert (paper.gru_layers, paper.hidden, paper.tcn_blocks) == (4, 128, 4)
    assert (paper.kernel, paper.filters, paper.connection) == (5, 128, "full")
    model = HierTCN(paper)
    assert [block.dilation for block in model.tcn.blocks] == [1, 2, 4, 8]
    # A configuration written before an option existed means its default.
    old = {"item_dim": 4, "hidden": 8, "dropout": 0.0}
    assert HierTCNConfig.from_dict(old) == HierTCNConfig(item_dim=4, hidden=8)


def test_a_linear_head_makes_u_an_affine_map_of_the_tcns_output():
    torch.manual_seed(0)
    model = HierTCN(dataclasses.replace(CONFIG, head="linear")).eval()
    lengths, state = torch.tensor([3, 1]), torch.randn(2, CONFIG.hidden)
    (layer,) = model.head
    hidden = []
    layer.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    u = model.encode(torch.randn(4, DIM), lengths, state)
    torch.testing.assert_close(u, hidden[0] @ layer.weight.T + layer.bias)
    assert len(HierTCN(CONFIG).head) == 3


def test_event_types_change_what_is_scored_and_are_read_by_name(log):
    store, table = log
    assert store.meta.event_types == EVENT_TYPES
    assert np.bincount(store.event_types).argmax() == 1 and (store.event_types == 0).any()
    model = build(log, "event types")
    items, lengths, state = torch.randn(2, DIM), torch.tensor([2]), torch.zeros(1, CONFIG.hidden)
    clicked, saved = (
        model.encode(items, lengths, state, context_of_one([0, 0], -1, types=[1, code]))
        for code in (1, 2)
    )
    same = torch.isclose(clicked, saved, atol=1e-7).all(1)
    assert same.tolist() == [True, True, False]
    # A later log numbers its types otherwise and has one the model does not know.
    later = copy.copy(store)
    later.meta = dataclasses.replace(store.meta, event_types=("rate", "save", "click"))
    later.event_types = np.array([0, 3, 2], np.uint8)[store.event_types]
    sessions = np.arange(store.meta.sessions)
    last = store.session_offsets[1:] - 1
    found = [embed_before(model, part, table, sessions, last) for part in (store, later)]
    torch.testing.assert_close(*found)
    later.event_types = np.where(store.event_types == 2, 1, later.event_types).astype(np.uint8)
    unknown = embed_before(model, later, table, sessions, last)
    assert not torch.allclose(unknown, found[0])


def test_the_grus_input_is_normalised_per_session_of_a_user(log):
    model = build(log, "batch norm")
    model.gru_norm.train()
    for step, shift in ((0, 0.0), (2, 5.0)):
        rows = torch.randn(20, 3 * CONFIG.hidden) + shift
        model.gru_norm(rows, torch.full((20,), step))
    model.eval()
    items, lengths, state = torch.randn(3, DIM), torch.tensor([3]), model.initial_state(1)
    first, later = (
        model.fold_items(state, items, lengths, context_of_one([0, 0, 0], -1, step=step))
        for step in (0, 2)
    )
    assert not torch.allclose(first, later, atol=1e-4)
    with pytest.raises(InputError, match="batch_norm"):
        model.gru_step(state, items[:1])
