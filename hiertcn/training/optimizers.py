"""Adam for a network and its item vectors, sparse where a batch touches few of many rows.

Clipping bounds the norm of all gradients together, the sparse ones included.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from hiertcn.training.checkpoints import optimizer_tensors, prefixed, restore_optimizer, under
from hiertcn.training.distributed import Ranks

DENSE_ITEMS: Final = 20_000
"""Up to this many items a dense step over all of them costs less than sparse bookkeeping."""

_DENSE: Final = "dense."
_SPARSE: Final = "sparse."


class Optimizers:
    """AdamW over the network, and AdamW or SparseAdam over the item vectors.

    Args:
        network: trained at the learning rate that :meth:`step` is given.
        vectors: trained at ``vector_rate`` times it; may have no parameters. A module that has an
            attribute ``sparse`` that is true gives sparse gradients and knows no weight decay.
        weight_decay: decoupled, as in AdamW.
        vector_rate: factor on the learning rate.
    """

    def __init__(
        self, network: nn.Module, vectors: nn.Module, *, weight_decay: float, vector_rate: float
    ) -> None:
        self._parameters = [*network.parameters(), *vectors.parameters()]
        groups: list[dict[str, Any]] = [{"params": list(network.parameters()), "rate": 1.0}]
        extra: dict[str, Any] = {"params": list(vectors.parameters()), "rate": vector_rate}
        self._sparse: torch.optim.SparseAdam | None = None
        if getattr(vectors, "sparse", False):
            self._sparse = torch.optim.SparseAdam([extra])
        elif extra["params"]:
            groups.append(extra)
        self._dense = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def sum_over(self, ranks: Ranks) -> None:
        """Replace the gradients by their sums over ranks."""
        sparse = set()
        if self._sparse is not None:
            sparse = {id(p) for group in self._sparse.param_groups for p in group["params"]}
        ranks.sum_gradients(self._parameters, [id(p) in sparse for p in self._parameters])

    def step(self, learning_rate: float, clip: float) -> None:
        """Clip the gradients to the norm ``clip`` and apply them."""
        self._clip(clip)
        for optimizer in self._all():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["rate"]
            optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as named tensors."""
        tensors = prefixed(_DENSE, optimizer_tensors(self._dense))
        if self._sparse is not None:
            tensors.update(prefixed(_SPARSE, optimizer_tensors(self._sparse)))
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`tensors` returned."""
        restore_optimizer(self._dense, under(_DENSE, tensors))
        if self._sparse is not None:
            restore_optimizer(self._sparse, under(_SPARSE, tensors))

    def _all(self) -> list[torch.optim.Optimizer]:
        return [self._dense] if self._sparse is None else [self._dense, self._sparse]

    def _clip(self, clip: float) -> None:
        gradients = []
        for parameter in self._parameters:
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                # Repeated rows add up before they have a norm.
                parameter.grad = parameter.grad.coalesce()
                gradients.append(parameter.grad.values())
            else:
                gradients.append(parameter.grad)
        norm = nn.utils.get_total_norm(gradients)
        factor = torch.clamp(clip / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(gradients, factor)
