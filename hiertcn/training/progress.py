"""Where a training run stands, and what it reports at its end."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from tqdm import tqdm


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """What training did.

    ``train_loss`` is the mean loss of the last stretch between validations; ``validation_mrr`` the
    best one, whose weights were kept, reached after ``best_step`` (0 without validation, the last
    weights kept); ``seconds`` counts whole epochs
    of resumed runs and all of the last; ``interactions_per_s`` counts training steps alone, with
    their waiting for data, whose share of the time is ``waiting_share``. ``parameters`` are the
    network's, ``item_parameters`` those of trained item vectors.
    """

    steps: int
    epochs: int
    best_step: int
    train_loss: float
    validation_mrr: float
    stopped: str
    seconds: float
    interactions_per_s: float
    waiting_share: float
    parameters: int
    item_parameters: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


@dataclass
class Progress:
    """Where a run stands; JSON-ready, part of the checkpoint."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    learning_rate: float = 0.0
    loss_sum: float = 0.0
    loss_targets: int = 0
    stale: int = 0
    best_step: int = 0
    best_mrr: float = -1.0
    seconds: float = 0.0
    training_seconds: float = 0.0
    waiting_seconds: float = 0.0
    training_interactions: int = 0
    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    validation_mrr: list[float] = field(default_factory=list)

    def mean_loss(self) -> float:
        """Return the mean loss a target since the last validation."""
        return self.loss_sum / max(self.loss_targets, 1)

    def add_step(self, loss: float, targets: int) -> None:
        """Count a step with that mean loss over that many targets."""
        self.loss_sum += loss * targets
        self.loss_targets += targets
        self.training_interactions += targets
        self.step += 1
        self.step_in_epoch += 1

    def add_validation(self, mrr: float | None, decay: float) -> bool:
        """Count a validation and return whether it is the best one; if not, decay the rate.

        Without an MRR the newest weights are the best ones.
        """
        self.steps.append(self.step)
        self.train_loss.append(self.mean_loss())
        self.validation_mrr.append(mrr or 0.0)
        self.loss_sum, self.loss_targets = 0.0, 0
        if mrr is None or mrr > self.best_mrr:
            self.best_mrr, self.best_step, self.stale = mrr or 0.0, self.step, 0
            return True
        self.stale += 1
        self.learning_rate *= decay
        return False

    def bar(self, interactions: int, epochs: int, *, shown: bool) -> Any:
        """Return a bar over the epoch's interactions: done, a second, and the time left."""
        return tqdm(
            total=interactions,
            desc=f"epoch {self.epoch + 1}/{epochs}",
            unit=" interactions",
            unit_scale=True,
            mininterval=2,
            disable=not shown,
        )

    def summary(self, stopped: str, network: nn.Module, vectors: nn.Module) -> TrainSummary:
        """Return what to report of a run that ended for the reason ``stopped``."""
        seconds = max(self.training_seconds, 1e-9)
        return TrainSummary(
            steps=self.step,
            epochs=self.epoch,
            best_step=self.best_step,
            train_loss=self.train_loss[-1],
            validation_mrr=self.best_mrr,
            stopped=stopped,
            seconds=self.seconds,
            interactions_per_s=self.training_interactions / seconds,
            waiting_share=self.waiting_seconds / seconds,
            parameters=sum(weights.numel() for weights in network.parameters()),
            item_parameters=sum(weights.numel() for weights in vectors.parameters()),
        )

    def curve(self) -> dict[str, Any]:
        """Return the validations: ``steps``, ``train_loss`` and ``validation_mrr``."""
        return {
            "steps": self.steps,
            "train_loss": self.train_loss,
            "validation_mrr": self.validation_mrr,
        }
