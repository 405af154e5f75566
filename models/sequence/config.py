"""What the configurations of the compared networks share."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

from hiertcn.errors import InputError
from models.head import HEADS, HeadName


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The width of the items a network reads and scores, and its dropout.

    ``item_dim`` is the width of the item table, its popularity coordinate included. All other
    whole numbers are sizes. ``input_dropout`` is of the item vectors' coordinates as the network
    reads them; those that score are whole.

    Raises:
        InputError: a size is not positive, or a dropout is outside [0, 1).
    """

    network: ClassVar[str]
    """Name of the network in tables, as in the paper."""

    item_dim: int
    dropout: float = 0.0
    input_dropout: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and (type(value) is not int or value < 1):
                self._refuse(field.name, value, "a whole number >= 1")
        for name in ("dropout", "input_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                self._refuse(name, getattr(self, name), f"0 <= {name} < 1")

    def to_dict(self) -> dict[str, Any]:
        """Return the network's name and the fields as JSON-ready values."""
        return {"network": self.network, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild a configuration from ``to_dict``'s result.

        Raises:
            InputError: a field is unknown, missing or out of range, or it is of another network.
        """
        given = dict(values)
        if given.pop("network", None) != cls.network:
            raise InputError(
                f"the configuration is of the network {values.get('network')!r}; expected "
                f"{cls.network!r}"
            )
        try:
            return cls(**given)
        except TypeError as error:
            raise InputError(
                f"the model configuration does not describe a {cls.network} ({error}); expected "
                f"the fields {', '.join(field.name for field in fields(cls))}"
            ) from None

    def _refuse(self, name: str, value: object, expected: str) -> None:
        raise InputError(f"{type(self).__name__}.{name} is {value!r}; expected {expected}")


@dataclass(frozen=True, kw_only=True)
class HeadedConfig(NetworkConfig):
    """The shape of a network whose output goes through a head, see :mod:`models.head`.

    Raises:
        InputError: there is no such head.
    """

    head: HeadName = "perceptron"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head not in HEADS:
            self._refuse("head", self.head, f"one of {', '.join(HEADS)}")
