"""Options of HierTCN's training."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from hiertcn.errors import InputError

Loss = Literal["softmax", "nce", "bpr", "hinge", "l2", "mrr"]
LOSSES: Final = ("softmax", "nce", "bpr", "hinge", "l2", "mrr")

Schedule = Literal["plateau", "cosine"]
SCHEDULES: Final = ("plateau", "cosine")

ItemVectorKind = Literal["frozen", "fine-tuned", "learned", "one-hot"]
ITEM_VECTOR_KINDS: Final = ("frozen", "fine-tuned", "learned", "one-hot")

_DEVICES: Final = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How HierTCN is trained; defaults suit logs of 10,000 to 10 M interactions on a CPU.

    Attributes:
        item_vectors: frozen (the item table's, as in the paper's production setting), fine-tuned
            (trained from the table's), learned (trained from random ones, but for the table's
            prior), or one-hot (learned, with a second learned matrix to score with; Eq. 17 with
            the softmax loss).
        item_learning_rate: Adam's for trained item vectors; 0 for the same as ``learning_rate``.
        lanes: users trained side by side (the paper's batch size is 32); 0 chooses from 8 to 256
            so that a step holds about 512 interactions.
        sessions_per_step: sessions of each lane in one step; back-propagation ends with the step.
        max_length: interactions beyond which a session is trained in pieces.
        learning_rate: Adam's, after ``warmup_steps`` of linear increase.
        warmup_steps: steps of that increase.
        schedule: plateau (``decay`` at each validation without improvement) or cosine (to zero over
            ``max_epochs`` or ``max_steps``, whichever is shorter).
        decay: factor on the learning rate at each validation without improvement; 1 for none.
        weight_decay: decoupled, as in AdamW; 0 for none.
        clip: largest norm of a step's gradient.
        loss: softmax (sampled, logQ-corrected), one of Eq. 13-16, or mrr (a smoothed MRR).
        margin: delta of the hinge loss.
        positions_ahead: items after the position whose prediction is asked of one embedding, within
            the session; 1 is the next alone.
        ahead_decay: weight of each position's loss beside the one before's.
        random_negatives: random items in the pool that all targets of a step share.
        in_batch_negatives: at most this many of the step's targets join the pool. A catalogue no
            larger than both together is used whole.
        max_impressions: at most this many shown items per interaction are negatives, where the log
            knows what was shown; 0 ignores impressions in the loss.
        impression_weight: weight of the softmax among shown items, beside the pool's weight of 1.
        max_epochs: at most this many passes over the training sessions.
        max_steps: at most this many steps; 0 for no limit.
        validate_steps: steps between validations besides those at each epoch's end; 0 for none.
        validation_requests: about this many interactions are ranked in a validation; 0 for no
            validation: the last weights are kept, and there is no early stopping.
        patience: validations without a better MRR before training stops.
        checkpoint_s: seconds between checkpoints; 0 writes one after every step.
        prefetch: batches that a thread makes ahead of a step; 0 for none. -1 chooses 2 on CUDA and
            0 on a CPU, where the thread takes more from the step than it gives (waiting for data
            was 1.2% of the time without it, 2.1% with it).
        bf16: run the network in bfloat16 where the device is CUDA; elsewhere it changes nothing.
        seed: of batches, negatives and dropout (the model's weights are the caller's).
        device: auto (CUDA if there is a device), cpu or cuda.

    Raises:
        InputError: a value is out of range.
    """

    item_vectors: ItemVectorKind = "frozen"
    item_learning_rate: float = 0.0
    lanes: int = 0
    sessions_per_step: int = 4
    max_length: int = 200
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    schedule: Schedule = "plateau"
    decay: float = 0.5
    weight_decay: float = 0.0
    clip: float = 1.0
    loss: Loss = "softmax"
    margin: float = 1.0
    positions_ahead: int = 1
    ahead_decay: float = 0.5
    random_negatives: int = 1536
    in_batch_negatives: int = 512
    max_impressions: int = 50
    impression_weight: float = 1.0
    max_epochs: int = 20
    max_steps: int = 0
    validate_steps: int = 0
    validation_requests: int = 4000
    patience: int = 3
    checkpoint_s: float = 30.0
    prefetch: int = -1
    bf16: bool = False
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in (
            "sessions_per_step",
            "max_length",
            "positions_ahead",
            "max_epochs",
            "patience",
        ):
            self._require(name, getattr(self, name) >= 1, "a whole number >= 1")
        for name in (
            "item_learning_rate",
            "lanes",
            "warmup_steps",
            "weight_decay",
            "random_negatives",
            "in_batch_negatives",
            "max_impressions",
            "impression_weight",
            "max_steps",
            "validate_steps",
            "validation_requests",
            "checkpoint_s",
            "seed",
        ):
            self._require(name, getattr(self, name) >= 0, "a number >= 0")
        self._require("prefetch", self.prefetch >= -1, "a whole number >= -1")
        for name in ("learning_rate", "clip", "margin"):
            self._require(name, getattr(self, name) > 0, "a number > 0")
        self._require("ahead_decay", 0 < self.ahead_decay <= 1, "a number above 0 and at most 1")
        self._require("decay", 0 < self.decay <= 1, "a number above 0 and at most 1")
        kinds = ITEM_VECTOR_KINDS
        self._require("item_vectors", self.item_vectors in kinds, f"one of {', '.join(kinds)}")
        self._require("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._require("loss", self.loss in LOSSES, f"one of {', '.join(LOSSES)}")
        self._require("device", self.device in _DEVICES, f"one of {', '.join(_DEVICES)}")
        if self.loss != "l2":
            self._require(
                "random_negatives",
                self.random_negatives + self.in_batch_negatives > 0,
                "a number > 0 where in_batch_negatives is 0",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainOptions":
        """Rebuild options from ``to_dict``'s result.

        Raises:
            InputError: a field is unknown or out of range.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"unknown training option ({error})") from None

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"TrainOptions.{name} is {getattr(self, name)!r}; expected {expected}")
