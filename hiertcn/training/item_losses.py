"""Losses of the item encoder, over a step's pairs and their negatives.

All compare unit vectors, whose dot products lie in [-1, 1]; a temperature spreads them.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

ITEM_LOSSES: Final = ("nce", "max_margin", "softmax")


def item_loss(
    name: str,
    positive: Tensor,
    negative: Tensor,
    is_negative: Tensor,
    *,
    negatives_weight: float,
    temperature: float,
    margin: float,
) -> Tensor:
    """Return the mean loss over the batch.

    - ``nce``: HierTCN Eq. 19, ``-log s(z_u z_v) - C E[log s(-z_u z_n)]``, E being the mean over the
      negatives and C ``negatives_weight``.
    - ``max_margin``: PinSage, section 3.3, ``E[max(0, z_u z_n - z_u z_v + margin)]``.
    - ``softmax``: cross-entropy of the positive among its negatives.

    Args:
        name: one of :data:`ITEM_LOSSES`.
        positive: float32 [batch], dot products with the positives.
        negative: float32 [batch, negatives].
        is_negative: bool [batch, negatives]; false where the negative is the pair's own item.
        negatives_weight: C of Eq. 19.
        temperature: divides the dot products of ``nce`` and ``softmax``.
        margin: of ``max_margin``.
    """
    counts = is_negative.sum(dim=1).clamp(min=1)
    if name == "max_margin":
        excess = torch.relu(negative - positive.unsqueeze(1) + margin)
        return ((excess * is_negative).sum(dim=1) / counts).mean()
    positive = positive / temperature
    negative = negative / temperature
    if name == "nce":
        against = (F.logsigmoid(-negative) * is_negative).sum(dim=1) / counts
        return (-F.logsigmoid(positive) - negatives_weight * against).mean()
    negative = negative.masked_fill(~is_negative, float("-inf"))
    everything = torch.logaddexp(positive, torch.logsumexp(negative, dim=1))
    return (everything - positive).mean()
