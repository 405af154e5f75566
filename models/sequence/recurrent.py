"""A GRU over sequences of different lengths.

Unlike models/gru.py, whose caller owns the order of steps, this one runs over time inside one call
of ``torch.nn.GRU``: a compiled loop on the CPU, one fused kernel on a GPU, so that the compared
networks are not slow for Python's sake. Its reset gate acts after the product with the state (the
variant of cuDNN), which Eq. 3 applies before; it is the same arithmetic otherwise.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


class PackedGRU(nn.Module):
    """A stacked GRU over packed sequences, one after another without padding.

    Args:
        input_dim: width of the input.
        hidden: width of every layer.
        layers: number of layers.
        dropout: share of a layer's outputs dropped before the next layer while training.
    """

    def __init__(self, input_dim: int, hidden: int, layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers, self.hidden = layers, hidden
        self.gru = nn.GRU(input_dim, hidden, layers, dropout=dropout if layers > 1 else 0.0)

    def forward(self, x: Tensor, lengths: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run over every sequence.

        Args:
            x: ``[positions, input_dim]`` float, one sequence after another.
            lengths: ``[sequences]`` int64 positions per sequence, zero allowed.
            state: ``[sequences, layers, hidden]`` float before the sequences.

        Returns:
            The top layer at every position, ``[positions, hidden]``, and the state after the
            sequences, shaped as before them.
        """
        if len(x) == 0:
            return x.new_zeros(0, self.hidden), state
        device = x.device
        order = torch.argsort(lengths, descending=True, stable=True)
        order = order[: int((lengths > 0).sum())]
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
        first = lengths.cumsum(0) - lengths
        position = torch.arange(len(x), device=device) - first.index_select(0, sequence)
        place = torch.empty_like(lengths)
        place[order] = torch.arange(len(order), device=device)
        # By position, then length: the order of a packed sequence of torch.
        by_time = torch.argsort(position * len(lengths) + place.index_select(0, sequence))
        packed = PackedSequence(x.index_select(0, by_time), torch.bincount(position).cpu())
        before = state.index_select(0, order).transpose(0, 1).contiguous()
        out, after = self.gru(packed, before)
        back = torch.empty_like(by_time)
        back[by_time] = torch.arange(len(by_time), device=device)
        return (
            out.data.index_select(0, back),
            state.index_copy(0, order, after.transpose(0, 1)),
        )
