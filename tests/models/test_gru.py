import numpy as np
import torch

from models.gru import GRUCell, StackedGRU


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def step_by_hand(cell, x, state):
    """Eq. 3 as printed, with the paper's nine matrices acting from the left on columns."""
    weights = {name: value.detach().numpy() for name, value in cell.named_parameters()}
    w_g, w_r, w_h = (part.T for part in np.split(weights["input_weight"], 3, axis=1))
    u_g, u_r = (part.T for part in np.split(weights["gate_weight"], 2, axis=1))
    u_h = weights["candidate_weight"].T
    g = sigmoid(w_g @ x + u_g @ state)
    r = sigmoid(w_r @ x + u_r @ state)
    h = np.tanh(w_h @ x + u_h @ (state * r))
    return (1 - g) * h + g * state


def test_cell_is_equation_3():
    torch.manual_seed(0)
    cell = GRUCell(5, 7)
    x, state = torch.randn(3, 5), torch.randn(3, 7)
    after = cell(x, state).detach().numpy()
    for row in range(3):
        expected = step_by_hand(cell, x[row].numpy(), state[row].numpy())
        np.testing.assert_allclose(after[row], expected, atol=1e-6)


def test_each_layer_reads_the_new_state_below():
    torch.manual_seed(1)
    gru = StackedGRU(5, 7, layers=3)
    x, state = torch.randn(1, 5), torch.randn(1, 3, 7)
    after = gru(state, x).detach().numpy()[0]
    below = x.numpy()[0]
    for layer, cell in enumerate(gru.cells):
        below = step_by_hand(cell, below, state[0, layer].numpy())
        np.testing.assert_allclose(after[layer], below, atol=1e-6)


def test_dropout_touches_the_candidate_alone():
    torch.manual_seed(2)
    cell = GRUCell(4, 1000, dropout=0.5)
    x, state = torch.randn(1, 4), torch.randn(1, 1000)
    kept = cell.eval()(x, state)
    dropped = cell.train()(x, state)
    projected = x @ cell.input_weight
    gate = torch.sigmoid(projected[:, :1000] + state @ cell.gate_weight[:, :1000])
    candidate = (kept - gate * state) / (1 - gate)
    zeroed = torch.isclose(dropped, gate * state, atol=1e-5)
    doubled = torch.isclose(dropped, (1 - gate) * 2 * candidate + gate * state, atol=1e-4)
    assert (zeroed | doubled).all()
    assert 400 < int(zeroed.sum()) < 600
