"""The two served networks of HierTCN, built from a trained one: its last position, and one step.

Serving asks only for the newest position of a session, which depends on a cone of earlier ones
that thins out with depth. Counted from the newest position backwards, the block of dilation
``2**r`` needs only every ``2**r``-th position; so with positions stored newest first, each block
is two convolutions of dilation 1 on an already thinned sequence, the second of which keeps every
second position for the block above. Each convolution is one dense product over concatenated
windows. That does an eighth of the plain graph's arithmetic at four blocks and exports without a
Conv node, so int8 (``hiertcn.export.int8``) reaches all of it.

Weights are copied at construction; training the original further changes nothing here.
"""

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hiertcn.errors import InputError
from models.hiertcn import HierTCN, HierTCNConfig
from models.tcn import CausalConv, TCNBlock


class TcnCone(nn.Module):
    """The user embedding after a session's newest interaction (Eq. 11, 4).

    Equals the last row of ``HierTCN.encode`` for that session. Positions at and beyond
    ``session_length`` may hold anything: the result does not depend on them, nor on how far the
    session is padded. A session may be cut to its newest ``receptive_field`` items, whether
    ``session_length`` then counts those or all.
    """

    def __init__(self, model: HierTCN) -> None:
        super().__init__()
        _require_servable(model.config)
        blocks = [block for block in model.tcn.blocks if isinstance(block, TCNBlock)]
        dilations = [block.dilation for block in blocks]
        if dilations[0] != 1 or any(above != 2 * below for below, above in pairwise(dilations)):
            raise InputError(
                f"the TCN has dilations {dilations}; serving expects 1, 2, 4, … (each block twice "
                "the one below)"
            )
        self.start_item = nn.Parameter(model.start_item.detach().clone(), requires_grad=False)
        self.blocks = nn.ModuleList(
            _ConeBlock(block, is_last=block is blocks[-1]) for block in blocks
        )
        self.head = nn.Sequential(*(copy.deepcopy(layer) for layer in model.head))

    def forward(self, session_items: Tensor, session_length: Tensor, user_state: Tensor) -> Tensor:
        """Encode open sessions.

        Args:
            session_items: ``[batch, length, item_dim]`` float32, newest first.
            session_length: ``[batch, 1]`` int32, real positions; 0 for a session not yet begun.
            user_state: ``[batch, hidden]`` float32, the GRU's top layer before the session.

        Returns:
            ``[batch, item_dim]`` float32, the dynamic user embedding ``u``.
        """
        items = F.pad(session_items, (0, 0, 0, 1))
        # The start token is the item before the first, so it follows the oldest one.
        place = torch.arange(items.shape[1], device=items.device)
        x = torch.where((place == session_length).unsqueeze(2), self.start_item, items)
        x = torch.cat([x, user_state.unsqueeze(1).expand(-1, x.shape[1], -1)], dim=2)
        is_real = (place <= session_length).unsqueeze(2)
        # A product with zero would let NaN through.
        x = torch.where(is_real, x, torch.zeros((), dtype=x.dtype))
        mask = is_real.to(x.dtype)
        for block in self.blocks:
            x, mask = block(x, mask)
        u: Tensor = self.head(x[:, 0])
        return u


class GruStep(nn.Module):
    """One step of the user state over one closed session (Eq. 10); see ``HierTCN.gru_step``."""

    def __init__(self, model: HierTCN) -> None:
        super().__init__()
        _require_servable(model.config)
        self.gru = copy.deepcopy(model.gru)

    def forward(self, state: Tensor, session_mean: Tensor) -> Tensor:
        """Advance.

        Args:
            state: ``[batch, layers, hidden]`` float32.
            session_mean: ``[batch, item_dim]`` float32, mean embedding of the session's items.

        Returns:
            ``[batch, layers, hidden]`` float32.
        """
        after: Tensor = self.gru(state, session_mean)
        return after


def _require_servable(config: HierTCNConfig) -> None:
    for name, served in (
        ("connection", "full"),
        ("aggregate", "mean"),
        ("batch_norm", False),
        ("time_gaps", False),
        ("event_types", ()),
    ):
        if getattr(config, name) != served:
            raise InputError(
                f"HierTCNConfig.{name} is {getattr(config, name)!r}; the serving graph expects "
                f"{served!r}: train the model to be served with it"
            )


class _ConeBlock(nn.Module):
    """A ``TCNBlock`` on positions newest first, thinned to what its dilation reaches.

    Positions before a session's start are zero at every layer (Eq. 6), which the bias would break
    without ``mask``.
    """

    def __init__(self, block: TCNBlock, *, is_last: bool) -> None:
        super().__init__()
        self.first = _Windows(block.first)
        self.second = _Windows(block.second)
        self.residual = copy.deepcopy(block.residual)
        self.is_last = is_last

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[batch, n, in]``, ``[batch, n, 1]`` to every second position, or the newest alone.

        ``x`` must be zero where ``mask`` is; the result is, too.
        """
        beyond = self.first.kernel - 1
        if self.is_last:
            x = F.pad(x, (0, 0, 0, 2 * beyond))[:, : 2 * beyond + 1]
            mask = F.pad(mask, (0, 0, 0, beyond))[:, : beyond + 1]
            hidden = torch.relu(self.first(x, stride=1)) * mask
            return torch.relu(self.residual(x[:, :1]) + torch.relu(self.second(hidden))), mask
        hidden = torch.relu(self.first(F.pad(x, (0, 0, 0, beyond)), stride=1)) * mask
        out = torch.relu(self.second(F.pad(hidden, (0, 0, 0, beyond))))
        mask = mask[:, ::2]
        return torch.relu(self.residual(x[:, ::2]) + out) * mask, mask


class _Windows(nn.Module):
    """A ``CausalConv`` of dilation 1 on positions newest first, as one product over windows."""

    taps: Tensor

    def __init__(self, conv: CausalConv) -> None:
        super().__init__()
        self.kernel = conv.kernel
        self.weight = nn.Parameter(conv.weight.detach().flatten(0, 1).clone(), requires_grad=False)
        self.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=False)
        self.register_buffer("taps", torch.arange(conv.kernel))

    def forward(self, x: Tensor, stride: int = 2) -> Tensor:
        """Map ``[batch, n, in]`` to ``[batch, ceil((n - kernel + 1) / stride), out]``."""
        count = (x.shape[1] - self.kernel) // stride + 1
        places = stride * torch.arange(count, device=x.device).unsqueeze(1) + self.taps
        windows = x.index_select(1, places.flatten())
        return windows.reshape(x.shape[0], count, len(self.weight)) @ self.weight + self.bias
