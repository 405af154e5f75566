"""The objective functions of HierTCN section 3.5.2 and the sampled softmax, one value a target.

All take scores, not vectors, except L2, which has none: ``positive`` is the target's ``x^T u``,
``negatives`` the ``c_i^T u`` of items that were not chosen. A mask says which negatives count, so
candidate lists of different lengths can be padded and a negative that happens to be the target can
be left out. Sums over negatives are sums, as printed, so their scale grows with the number of
negatives.

Equation 15 as printed rewards scoring negatives *above* the target; the difference is taken the
other way round here, as in the paper it cites (Rendle et al. 2009).
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


def l2(u: Tensor, target: Tensor) -> Tensor:
    """Eq. 13, the Euclidean distance: ``[n, dim], [n, dim] -> [n]``."""
    distance: Tensor = torch.linalg.vector_norm(target - u, dim=1)
    return distance


def nce(positive: Tensor, negatives: Tensor, mask: Tensor) -> Tensor:
    """Eq. 14: ``-log s(x u) - sum_i log s(-c_i u)``.

    Args:
        positive: ``[n]`` float.
        negatives: ``[n, m]`` float.
        mask: ``[n, m]`` bool, true where a negative counts.

    Returns:
        ``[n]``.
    """
    return -logsigmoid(positive) + (softplus(negatives) * mask).sum(1)


def bpr(positive: Tensor, negatives: Tensor, mask: Tensor) -> Tensor:
    """Eq. 15 with the sign of Rendle et al.: ``-sum_i log s(x u - c_i u)``; shapes as `nce`."""
    return (softplus(negatives - positive.unsqueeze(1)) * mask).sum(1)


def hinge(positive: Tensor, negatives: Tensor, mask: Tensor, margin: float) -> Tensor:
    """Eq. 16: ``sum_i max(0, margin + c_i u - x u)``; shapes as `nce`."""
    return (torch.relu(margin + negatives - positive.unsqueeze(1)) * mask).sum(1)


def softmax(
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor,
    log_expected: Tensor | None = None,
) -> Tensor:
    """Cross-entropy (Eq. 17) of the target among itself and its negatives.

    With ``log_expected`` it estimates the softmax over the whole catalogue (logQ correction):
    ``-x u + log(exp(x u) + sum_i exp(c_i u) / E_i)``, where ``E_i`` is how often the sampler is
    expected to draw item ``i``. The sum's expectation is the catalogue's partition function without
    the target, which enters exactly and must therefore be masked among the negatives. Negatives
    that are the whole catalogue with ``E = 1`` give the softmax itself.

    Args:
        positive: ``[n]`` float.
        negatives: ``[n, m]`` float.
        mask: ``[n, m]`` bool, true where a negative counts.
        log_expected: ``[m]`` or ``[n, m]`` float, or None for ``E = 1``.

    Returns:
        ``[n]``, zero for a target without negatives.
    """
    if log_expected is not None:
        negatives = negatives - log_expected
    negatives = torch.where(mask, negatives, -torch.inf)
    every = torch.cat([positive.unsqueeze(1), negatives], dim=1)
    return -torch.log_softmax(every, dim=1)[:, 0]


def catalogue_softmax(positive: Tensor, scores: Tensor) -> Tensor:
    """Cross-entropy (Eq. 17) over the whole catalogue, the target included among ``scores``.

    Args:
        positive: ``[n]`` float, the target's score.
        scores: ``[n, items]`` float, every item's.

    Returns:
        ``[n]``.
    """
    return torch.logsumexp(scores, dim=1) - positive


def approximate_mrr(
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor,
    log_expected: Tensor | None = None,
    temperature: float = 0.2,
) -> Tensor:
    """Minus the reciprocal of a smoothed rank (ApproxNDCG's rank; Qin, Liu and Li 2010).

    ``-1 / (1 + sum_i s((c_i u - x u) / temperature) / E_i)``: as the temperature falls it becomes
    minus the reciprocal rank, so its mean is what MRR measures, where a likelihood spends as much
    on targets that end up far down anyway.

    Args:
        positive: ``[n]`` float.
        negatives: ``[n, m]`` float.
        mask: ``[n, m]`` bool, true where a negative counts.
        log_expected: ``[m]`` or ``[n, m]`` float, see `softmax`, or None for ``E = 1``.
        temperature: difference of scores at which a rank is crossed.

    Returns:
        ``[n]``, -1 for a target without negatives.
    """
    beaten = torch.sigmoid((negatives - positive.unsqueeze(1)) / temperature) * mask
    if log_expected is not None:
        beaten = beaten * torch.exp(-log_expected)
    return -1.0 / (1.0 + beaten.sum(1))
