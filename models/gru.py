"""The gated recurrent unit of the paper (HierTCN Eq. 3), stacked, one step at a time.

The paper's cell is not ``torch.nn.GRUCell``: the reset gate acts on the state *before* it is
multiplied by ``U^h``, the update gate ``g`` weighs the *previous* state, there are no biases, and
dropout touches the candidate activation alone (section 3.5.3), so that a step never wipes out what
the state remembers. A stack of single steps also exports to plain matrix products, which a
sequence GRU of dynamic length does not.

Costs three products of the batch per layer and step. Does not loop over time: the caller owns the
order of sessions.
"""

import math

import torch
from torch import Tensor, nn

from models.dropout import Dropout


class GRUCell(nn.Module):
    """One layer of Eq. 3: ``s' = (1 - g) * dropout(h) + g * s``.

    Weights multiply from the right: ``input_weight [input_dim, 3 * hidden]`` holds ``W^g, W^r,
    W^h`` side by side, ``gate_weight [hidden, 2 * hidden]`` holds ``U^g, U^r``, and
    ``candidate_weight [hidden, hidden]`` is ``U^h``.
    """

    def __init__(self, input_dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = hidden
        self.input_weight = nn.Parameter(torch.empty(input_dim, 3 * hidden))
        self.gate_weight = nn.Parameter(torch.empty(hidden, 2 * hidden))
        self.candidate_weight = nn.Parameter(torch.empty(hidden, hidden))
        self.dropout = Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights from ``U(-b, b)``, ``b = 1/sqrt(hidden)``, as torch's cell does."""
        bound = 1.0 / math.sqrt(self.hidden)
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """Advance one step.

        Args:
            x: ``[batch, input_dim]`` float.
            state: ``[batch, hidden]`` float, the state before the step.

        Returns:
            ``[batch, hidden]``, the state after it.
        """
        return self.step_from_projection(x @ self.input_weight, state)

    def step_from_projection(self, projected: Tensor, state: Tensor) -> Tensor:
        """Advance one step from ``x @ input_weight``, ``[batch, 3 * hidden]``.

        Lets a caller who knows the inputs of many steps beforehand project them in one product.
        """
        hidden = self.hidden
        gates = torch.sigmoid(torch.addmm(projected[:, : 2 * hidden], state, self.gate_weight))
        update, reset = gates[:, :hidden], gates[:, hidden:]
        candidate = torch.tanh(
            torch.addmm(projected[:, 2 * hidden :], state * reset, self.candidate_weight)
        )
        # Products may run in half precision; what a user's state remembers does not.
        kept, new = update.to(state.dtype), self.dropout(candidate).to(state.dtype)
        after: Tensor = torch.lerp(new, state, kept)
        return after


class StackedGRU(nn.Module):
    """``layers`` cells, each fed with the new state of the one below."""

    def __init__(self, input_dim: int, hidden: int, layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.input_dim, self.hidden, self.layers = input_dim, hidden, layers
        self.cells = nn.ModuleList(
            GRUCell(input_dim if layer == 0 else hidden, hidden, dropout) for layer in range(layers)
        )

    def project(self, x: Tensor) -> Tensor:
        """Return the first layer's input projection, ``[..., input_dim] -> [..., 3 * hidden]``."""
        weight: Tensor = self._cell(0).input_weight
        return x @ weight

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """Advance every layer one step.

        Args:
            state: ``[batch, layers, hidden]`` float.
            x: ``[batch, input_dim]`` float.

        Returns:
            ``[batch, layers, hidden]``.
        """
        return self.step_from_projection(state, self.project(x))

    def step_from_projection(self, state: Tensor, projected: Tensor) -> Tensor:
        """Advance every layer one step from ``project(x)``, ``[batch, 3 * hidden]``."""
        below = self._cell(0).step_from_projection(projected, state[:, 0])
        after = [below]
        for layer in range(1, self.layers):
            below = self._cell(layer)(below, state[:, layer])
            after.append(below)
        return torch.stack(after, dim=1)

    def _cell(self, layer: int) -> GRUCell:
        cell = self.cells[layer]
        assert isinstance(cell, GRUCell)
        return cell
