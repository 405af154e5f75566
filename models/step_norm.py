"""Batch normalisation of sequences, with statistics of each time step (HierTCN section 3.5.3)."""

import torch
from torch import Tensor, nn


class StepNorm(nn.Module):
    """Batch normalisation with statistics of each time step of its own (section 3.5.3).

    Steps at and beyond ``steps`` share the last one's statistics. While training, a step with fewer
    than ``fewest`` positions in the batch uses its running statistics, which would otherwise be one
    session's own values; a step never seen uses those of the last one before it that was.

    Args:
        channels: width.
        steps: time steps with statistics of their own.
        momentum: share of a batch in the running statistics.
        fewest: see above.
    """

    mean: Tensor
    variance: Tensor
    seen: Tensor

    def __init__(
        self, channels: int, steps: int, *, momentum: float = 0.1, fewest: int = 8
    ) -> None:
        super().__init__()
        self.momentum, self.fewest, self.epsilon = momentum, fewest, 1e-5
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.register_buffer("mean", torch.empty(steps, channels))
        self.register_buffer("variance", torch.empty(steps, channels))
        self.register_buffer("seen", torch.empty(steps, dtype=torch.bool))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget all statistics, and scale by 1."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.mean.zero_()
        self.variance.fill_(1.0)
        self.seen.zero_()

    def forward(self, rows: Tensor, step: Tensor, counts: Tensor | None = None) -> Tensor:
        """Normalise real positions; whoever pads leaves the padding out before.

        Args:
            rows: ``[n, channels]`` float.
            step: ``[n]`` int64, the time step of each row.
            counts: ``[n]`` bool, the rows that enter the statistics; None for all.

        Returns:
            ``[n, channels]`` float32.
        """
        rows = rows.float()
        step = step.clamp(max=len(self.seen) - 1)
        mean, variance = self._running()
        if self.training:
            counted, their_step = (rows, step) if counts is None else (rows[counts], step[counts])
            mean, variance = self._of_batch(counted, their_step, mean, variance)
        scale = self.weight * torch.rsqrt(variance + self.epsilon)
        shift = self.bias - mean * scale
        normed: Tensor = rows * scale.index_select(0, step) + shift.index_select(0, step)
        return normed

    def _running(self) -> tuple[Tensor, Tensor]:
        steps = torch.arange(len(self.seen), device=self.seen.device)
        last_seen = torch.where(self.seen, steps, 0).cummax(0).values
        return self.mean.index_select(0, last_seen), self.variance.index_select(0, last_seen)

    def _of_batch(
        self, rows: Tensor, step: Tensor, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        count = torch.bincount(step, minlength=len(self.seen)).unsqueeze(1)
        divisor = count.clamp(min=1).to(rows.dtype)
        own_mean = torch.zeros_like(mean).index_add(0, step, rows) / divisor
        off = rows - own_mean.index_select(0, step)
        own_variance = torch.zeros_like(mean).index_add(0, step, off * off) / divisor
        enough = count >= self.fewest
        with torch.no_grad():
            share = torch.where(self.seen.unsqueeze(1), self.momentum, 1.0)
            unbiased = own_variance * divisor / (divisor - 1).clamp(min=1)
            for running, own in ((self.mean, own_mean), (self.variance, unbiased)):
                running.copy_(torch.where(enough, torch.lerp(running, own, share), running))
            self.seen |= enough.squeeze(1)
        return torch.where(enough, own_mean, mean), torch.where(enough, own_variance, variance)
