"""What turns a network's last hidden vector into the dynamic user embedding ``u``."""

from typing import Final, Literal

from torch import nn

from models.dropout import Dropout

HeadName = Literal["perceptron", "linear"]
HEADS: Final = ("perceptron", "linear")


def make_head(name: HeadName, width: int, item_dim: int, dropout: float = 0.0) -> nn.Sequential:
    """Return the head, ``[..., width] -> [..., item_dim]``.

    Args:
        name: perceptron, the two layers of Eq. 4, or linear, the second of them alone.
        width: of the hidden vector, and of the perceptron's inner layer.
        item_dim: of the item vectors.
        dropout: share of the hidden vector's coordinates dropped while training.
    """
    layers: list[nn.Module] = [Dropout(dropout)] if dropout else []
    if name == "perceptron":
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, item_dim))
