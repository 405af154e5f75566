"""What item encoder training can be told, and what it tells."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from hiertcn.errors import InputError
from hiertcn.training.item_hard_negatives import RANKS, check_ranks
from hiertcn.training.item_losses import ITEM_LOSSES


@dataclass(frozen=True, kw_only=True)
class ItemEncoderOptions:
    """How the encoder is trained.

    Attributes:
        epochs: most passes; an epoch draws as many pairs as the graph has edges, in at most
            ``steps_per_epoch`` steps (0: no limit).
        max_steps: most optimizer steps with edges held out, and again of the final epochs (0: no
            limit).
        batch: pairs a step.
        lr: Adam's learning rate; it falls to a tenth along a half cosine over the planned steps.
        loss: ``softmax``, ``nce`` (HierTCN Eq. 19) or ``max_margin`` (PinSage).
        negatives: items drawn uniformly a step, shared by all its pairs.
        in_batch_negatives: also compare with the other pairs' positives. They come up as often as
            they are popular, so what is learned is how well items go together beyond that; the
            item table's popularity coordinate (``hiertcn.items.prior``) says the rest, and newer.
        logq: let ``softmax`` correct for how often each negative is drawn, so that the dot products
            hold popularity too.
        hard_negatives: most hard negatives per pair: none in the first epoch, n - 1 in epoch n
            (PinSage, section 3.3; see ``item_hard_negatives``).
        hard_ranks: walk ranks they are drawn from, in a catalog of 100,000 items or more.
        negatives_weight: C of Eq. 19.
        temperature: divides the dot products of ``softmax`` and ``nce``; ``nce`` learns better
            with 0.3.
        margin: of ``max_margin``.
        weight_power: pairs are drawn in proportion to edge weight to this power.
        spectral_start_items: most items of a graph whose id vectors start from its decomposition
            (``item_spectral_start``) where there is no earlier encoder to start from; in larger
            graphs, or with 0, they start at random. 500,000 items with 50 neighbors take a minute
            and 2.2 GB.
        id_dropout: share of a step's items that are encoded without their id vectors, as an item
            added between builds is.
        neighborhood_dropout: share of a step's items that are encoded without their neighbors,
            among those with features; they lose their id vectors first, so up to ``id_dropout``
            they are encoded from features alone.
        patience: epochs without a better hit rate before training stops.
        final_epochs: epochs on the whole graph, after the best epoch was found without the
            held-out edges; 0 for none.
        validation_share: share of the item pairs held out; ``max_validation_edges`` at most.
        seed: of weights' draws, pairs and held-out edges.
    """

    epochs: int = 5
    steps_per_epoch: int = 80
    max_steps: int = 0
    batch: int = 512
    lr: float = 0.01
    loss: str = "softmax"
    negatives: int = 256
    in_batch_negatives: bool = True
    logq: bool = False
    hard_negatives: int = 0
    hard_ranks: tuple[int, int] = RANKS
    negatives_weight: float = 1.0
    temperature: float = 0.1
    margin: float = 0.3
    weight_power: float = 1.0
    spectral_start_items: int = 500_000
    id_dropout: float = 0.1
    neighborhood_dropout: float = 0.05
    patience: int = 3
    final_epochs: int = 2
    validation_share: float = 0.05
    max_validation_edges: int = 5_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "negatives", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in (
            "steps_per_epoch",
            "max_steps",
            "hard_negatives",
            "spectral_start_items",
            "final_epochs",
            "max_validation_edges",
        ):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("lr", "temperature", "negatives_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; expected a number above 0")
        if self.loss not in ITEM_LOSSES:
            raise InputError(f"loss is {self.loss!r}; expected one of {', '.join(ITEM_LOSSES)}")
        check_ranks(self.hard_ranks)
        for name in ("id_dropout", "neighborhood_dropout", "validation_share"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected a share in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ItemEncoderSummary:
    """What training found.

    Attributes:
        train_loss: mean loss per epoch; ``validation_hit_rate`` after each, None if unmeasured.
        best_epoch: 1-based epoch whose weights were kept; 0 if none was trained.
        hit_rate: hit rate@10 on the held-out edges with the kept weights, before they were taught
            those edges.
        baseline_hit_rates: the same question put to ``features`` (cosine, if any), ``popularity``
            (weighted degree) and ``random`` vectors.
        held_out_edges: edges asked for.
        steps: optimizer steps; ``stopped_early`` if patience ran out.
        warm_started: parameters taken over from an earlier encoder.
        resumed_epochs: epochs that an earlier, killed run had done.
    """

    train_loss: list[float]
    validation_hit_rate: list[float | None]
    best_epoch: int
    hit_rate: float | None
    baseline_hit_rates: dict[str, float]
    held_out_edges: int
    steps: int
    stopped_early: bool
    warm_started: list[str]
    resumed_epochs: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self)
