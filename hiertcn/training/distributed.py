"""Data-parallel training over the processes that torchrun starts.

Each rank trains on its share of the lanes, whose states never leave it, and gradients are added up
before every update, weighted by how many targets each rank had: the update is the one a single
process would make of all lanes' batch, to float tolerance. ``DistributedDataParallel`` averages
ranks alike however many targets each has, and expects every rank to have a batch, so gradients are
summed here, dense ones in one message.
"""

import os
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from hiertcn.sessions.batches import SessionBatch, SessionBatches
from hiertcn.training.lanes import LaneBatch


class Ranks:
    """The processes of one training; all methods are collective.

    Attributes:
        rank: of this process.
        world_size: number of processes; with 1 every method returns what it was given.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size

    @classmethod
    def join(cls, device: torch.device) -> "Ranks":
        """Join the group that torchrun's environment describes; alone where there is none.

        Uses gloo on a CPU and NCCL on CUDA.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and validates."""
        return self.rank == 0

    def share_weights(self, module: nn.Module) -> None:
        """Give every rank the first one's parameters and buffers."""
        if self.world_size == 1:
            return
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, 0)

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Return the sums over ranks."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def from_first(self, value: float, device: torch.device) -> float:
        """Return the first rank's value."""
        return self.sum([value if self.is_first else 0.0], device)[0]

    def concatenate(self, own: Tensor) -> Tensor:
        """Return every rank's rows ``[n_rank, ...]``, rank after rank; n may differ."""
        if self.world_size == 1:
            return own
        counts = torch.zeros(self.world_size, dtype=torch.int64, device=own.device)
        counts[self.rank] = len(own)
        dist.all_reduce(counts)
        most = int(counts.max())
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])

    def sum_gradients(self, parameters: Sequence[nn.Parameter], sparse: Sequence[bool]) -> None:
        """Replace each gradient by its sum over ranks.

        A parameter without a gradient on any rank keeps none, so that weight decay treats it as a
        single process would.

        Args:
            parameters: the same ones in the same order on every rank.
            sparse: which of them have sparse gradients.
        """
        if self.world_size == 1:
            return
        dense = [p for p, is_sparse in zip(parameters, sparse, strict=True) if not is_sparse]
        if dense:
            # Behind the gradients stands who has one.
            flat = torch.cat(
                [
                    *(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                      for p in dense),
                    torch.tensor([float(p.grad is not None) for p in dense]).to(dense[0]),
                ]
            )  # fmt: skip
            dist.all_reduce(flat)
            *sums, has_one = torch.split(flat, [*(p.numel() for p in dense), len(dense)])
            for p, total, has in zip(dense, sums, has_one.tolist(), strict=True):
                p.grad = total.view_as(p) if has else None
        for p, is_sparse in zip(parameters, sparse, strict=True):
            if is_sparse:
                self._sum_sparse(p)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def _sum_sparse(self, parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            rows = torch.empty(0, dtype=torch.int64, device=parameter.device)
            values = parameter.new_empty(0, *parameter.shape[1:])
        else:
            own = parameter.grad.coalesce()
            rows, values = own.indices()[0], own.values()
        rows, values = self.concatenate(rows), self.concatenate(values.detach())
        if len(rows):
            parameter.grad = torch.sparse_coo_tensor(
                rows.unsqueeze(0), values, parameter.shape, check_invariants=False
            ).coalesce()


def targets_of_ranks(
    ranks: Ranks, batches: SessionBatches, batch: SessionBatch, tensors: LaneBatch
) -> NDArray[np.int64]:
    """Return all ranks' target rows, int64, in the order of a single process's batch."""
    slot = np.repeat(np.arange(len(batch.slot_offsets) - 1), np.diff(batch.slot_offsets))
    place = slot * batches.lanes + batch.lane + batches.first_lane
    of_target = torch.from_numpy(np.repeat(place, batch.lengths)[batch.targets])
    rows = tensors.target_rows
    keyed = ranks.concatenate(torch.stack([of_target.to(rows.device), rows], dim=1))
    places, found = keyed.cpu().numpy().T
    ordered: NDArray[np.int64] = found[np.argsort(places, kind="stable")]
    return ordered
