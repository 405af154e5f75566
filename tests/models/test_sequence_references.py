"""The packed networks against slow, obvious ones: one sequence at a time, one step at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.training.item_vectors import TrainedVectors
from models.sequence.gru import GRUConfig
from models.sequence.hierarchical import HRNNConfig
from models.sequence.networks import build_network
from models.sequence.recurrent import PackedGRU
from models.sequence.sasrec import SASRecConfig
from models.sequence.tcn import FlatTCNConfig
from models.sequence.tokens import Windows, request_windows
from tests.models.test_sequence_networks import ITEMS, embed, every_request, of_lists

DIM = 6
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
histories = st.lists(
    st.lists(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=5), min_size=1, max_size=5),
    min_size=1,
    max_size=3,
)


@pytest.fixture
def vectors():
    torch.manual_seed(2)
    return TrainedVectors(torch.randn(ITEMS, DIM))


def history_tokens(network, vectors, sessions):
    """A user's scaled tokens one by one, and for each item the number of tokens before it."""
    tokens, before = [], []
    for session in sessions:
        tokens.append(network.start_item)
        for row in session:
            before.append(len(tokens))
            tokens.append(vectors.all()[row])
    return torch.stack(tokens) * math.sqrt(DIM), before


def test_a_packed_gru_runs_every_sequence_by_itself():
    torch.manual_seed(0)
    gru = PackedGRU(5, 4, 3)
    lengths = torch.tensor([3, 0, 6, 1, 3])
    x, state = torch.randn(13, 5), torch.randn(5, 3, 4)
    out, after = gru(x, lengths, state)
    for k, part in enumerate(x.split(lengths.tolist())):
        if not len(part):
            assert torch.equal(after[k], state[k])
            continue
        alone, last = gru.gru(part.unsqueeze(1), state[k].unsqueeze(1).contiguous())
        torch.testing.assert_close(out.split(lengths.tolist())[k], alone.squeeze(1), **CLOSE)
        torch.testing.assert_close(after[k], last.squeeze(1), **CLOSE)
    empty, same = gru(x[:0], torch.zeros(2, dtype=torch.int64), state[:2])
    assert empty.shape == (0, 4) and torch.equal(same, state[:2])


def test_the_flat_gru_is_one_step_per_token(vectors):
    network = build_network(GRUConfig(item_dim=DIM, hidden=5, layers=2)).eval()
    users = [[[1, 2, 3], [4], [5, 6]], [[7, 8]]]
    store = of_lists(users)
    u = embed(network, store, vectors, every_request(store))
    expected = []
    for sessions in users:
        tokens, before = history_tokens(network, vectors, sessions)
        state, outputs = torch.zeros(2, 1, 5), []
        for token in tokens:
            out, state = network.gru.gru(token.view(1, 1, -1), state)
            outputs.append(network.head(out.view(-1)))
        expected += [outputs[count - 1] for count in before]
    torch.testing.assert_close(u, torch.stack(expected), **CLOSE)


def test_the_flat_tcn_is_a_padded_convolution_of_the_whole_history(vectors):
    config = FlatTCNConfig(item_dim=DIM, filters=4, blocks=2, kernel=3)
    network = build_network(config).eval()
    rng = np.random.default_rng(0)
    users = [[rng.integers(0, ITEMS, int(rng.integers(1, 9))).tolist() for _ in range(9)]]
    store = of_lists(users)
    assert store.meta.interactions > 2 * network.receptive_field
    u = embed(network, store, vectors, every_request(store))
    tokens, before = history_tokens(network, vectors, users[0])
    x = tokens.T.unsqueeze(0)
    for block in network.tcn.blocks:
        out = x
        for conv in (block.first, block.second):
            kernel = conv.weight.permute(2, 1, 0).flip(2)
            padded = torch.nn.functional.pad(out, (conv.dilation * (conv.kernel - 1), 0))
            out = torch.relu(
                torch.nn.functional.conv1d(padded, kernel, conv.bias, dilation=conv.dilation)
            )
        x = torch.relu(block.residual(x.transpose(1, 2)).transpose(1, 2) + out)
    expected = network.head(x[0].T)[[count - 1 for count in before]]
    torch.testing.assert_close(u, expected, **CLOSE)


def test_sasrec_is_plain_attention_over_the_window_of_each_request(vectors):
    config = SASRecConfig(item_dim=DIM, hidden=8, heads=2, piece=5, context=3)
    network = build_network(config).eval()
    users = [[[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11, 12, 13]], [[1], [2]]]
    store = of_lists(users)
    u = embed(network, store, vectors, every_request(store))
    expected = []
    for sessions in users:
        flat = [(row, place == 0) for session in sessions for place, row in enumerate(session)]
        for asked in range(len(flat)):
            begin = max(asked // 5 * 5 - 3, 0)
            x = []
            for place, (row, is_first) in enumerate(flat[begin : asked + 1]):
                if is_first:
                    x.append((network.start_item, place))
                if begin + place < asked:
                    x.append((vectors.all()[row], place))
            expected.append(attend(network, x))
    torch.testing.assert_close(u, torch.stack(expected), **CLOSE)


def attend(network, tokens):
    """The last output of a window of (vector, position), query by query and head by head."""
    x = torch.stack(
        [
            network.read(vector * math.sqrt(DIM)) + network.positions[place]
            for vector, place in tokens
        ]
    )
    for block in network.blocks:
        query, key, value = block.queries_keys_values(block.attention_norm(x)).chunk(3, dim=1)
        mixed = torch.zeros_like(query)
        for head in (slice(0, 4), slice(4, 8)):
            for t in range(len(x)):
                weight = torch.softmax(key[: t + 1, head] @ query[t, head] / 2.0, dim=0)
                mixed[t, head] = weight @ value[: t + 1, head]
        x = x + block.mix(mixed)
        x = x + block.feed_forward(block.forward_norm(x))
    return network.write(network.norm(x[-1]))


@pytest.mark.parametrize("feeds", [False, True], ids=["Init", "All"])
def test_hrnn_is_two_loops(vectors, feeds):
    config = HRNNConfig(item_dim=DIM, hidden=5, layers=2, feeds_every_position=feeds)
    network = build_network(config).eval()
    users = [[[1, 2, 3], [4], [5, 6]], [[7, 8]]]
    store = of_lists(users)
    u = embed(network, store, vectors, every_request(store))
    expected = []
    for sessions in users:
        user = torch.zeros(1, 2, 5)
        for session in sessions:
            top = user[0, -1]
            state = torch.tanh(network.init(top)).view(2, 1, 5)
            for row in [None, *session]:
                item = network.start_item if row is None else vectors.all()[row]
                item = item * math.sqrt(DIM)
                token = torch.cat([item, top]) if feeds else item
                out, state = network.session_gru.gru(token.view(1, 1, -1), state)
                expected.append(network.head(out.view(-1)))
            expected.pop()
            user = network.user_gru(user, state[-1])
    torch.testing.assert_close(u, torch.stack(expected), **CLOSE)


@settings(max_examples=60)
@given(histories, st.integers(1, 6), st.integers(1, 4), st.integers(1, ITEMS), st.data())
def test_windows_of_requests_hold_what_a_walk_over_the_history_gives(
    users, piece, context, known, data
):
    store = of_lists(users)
    requests = every_request(store)
    chosen = data.draw(st.lists(st.integers(0, len(requests) - 1), min_size=1, max_size=8))
    asked = requests.take(np.array(chosen))
    found = request_windows(
        store, known, asked.session, asked.interaction, piece=piece, context=context
    )
    windows = Windows.of(found.counts, found.starts, "cpu", found.ends_with_start)
    ends = windows.lengths.cumsum(0).tolist()
    for i, last in enumerate(found.token(windows).tolist()):
        window = int(found.window[i])
        begin = ends[window] - int(windows.lengths[window])
        assert begin <= last < ends[window]
        tokens = [
            -1 if item < 0 else int(found.rows[item])
            for item in windows.item[begin : last + 1].tolist()
        ]
        # Known items before the request with their sessions, cut where training cuts.
        user = int(asked.user[i])
        history = [
            (int(store.item_rows[at]), session)
            for session in range(store.user_offsets[user], store.user_offsets[user + 1])
            for at in range(store.session_offsets[session], store.session_offsets[session + 1])
            if at < asked.interaction[i] and store.item_rows[at] < known
        ]
        history.append((-2, int(asked.session[i])))
        first = max((len(history) - 1) // piece * piece - context, 0)
        expected = []
        for at in range(first, len(history)):
            if at == 0 or history[at - 1][1] != history[at][1]:
                expected.append(-1)
            expected.append(history[at][0])
        assert tokens == expected[:-1]
