"""The shape of a HierTCN: every choice of the paper as an option, and its own setting by name."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from hiertcn.errors import InputError
from models.head import HEADS, HeadName

Connection = Literal["full", "init"]
CONNECTIONS: Final = ("full", "init")
Aggregate = Literal["mean", "last", "weighted"]
AGGREGATES: Final = ("mean", "last", "weighted")

_NAMES: Final = ("event_types", "terms")


@dataclass(frozen=True, kw_only=True)
class HierTCNConfig:
    """The shape of a HierTCN; defaults are the paper's (section 4.2.3), see also :meth:`paper`.

    Attributes:
        item_dim: width of the item table, its popularity coordinate included.
        hidden: width of a GRU layer.
        gru_layers: layers of the GRU.
        tcn_blocks: blocks of the TCN, of dilation 1, 2, 4, ...
        kernel: taps of a convolution.
        filters: width of the TCN.
        dropout: of the GRU's candidate activation, and after each convolution.
        input_dropout: of the item vectors' coordinates as the networks read them; those that score
            are whole.
        connection: full (the user state is input at every position) or init (at the start token
            alone), section 3.4.2.
        aggregate: what the GRU reads of a session: mean (of its items), weighted (a mean with the
            softmax of a learned linear score as weights) or last (the TCN's last hidden vector).
        head: perceptron (Eq. 4, two layers) or linear (the second of them alone) between the TCN
            and the dynamic user embedding.
        batch_norm: normalise after each convolution and what the GRU's first layer makes of its
            input, with statistics per time step: positions of a session, and sessions of a user
            (section 3.5.3). Between a layer's steps nothing is normalised.
        time_gaps: read the times between sessions and between interactions.
        event_types: those the TCN reads of each item of the running session; the training store's
            (``StoreMeta.event_types``) or none. Others count as no type.
        terms: the memory and freshness features that are scored beside the dot product
            (models/scoring_terms.py).

    Raises:
        InputError: a value is out of range.
    """

    item_dim: int
    hidden: int = 128
    gru_layers: int = 4
    tcn_blocks: int = 4
    kernel: int = 5
    filters: int = 128
    dropout: float = 0.0
    input_dropout: float = 0.0
    connection: Connection = "full"
    aggregate: Aggregate = "mean"
    head: HeadName = "perceptron"
    batch_norm: bool = False
    time_gaps: bool = False
    event_types: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("item_dim", "hidden", "gru_layers", "tcn_blocks", "kernel", "filters"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"HierTCNConfig.{name} is {value!r}; expected a whole number >= 1")
        for name in ("dropout", "input_dropout"):
            share = getattr(self, name)
            if not 0.0 <= share < 1.0:
                raise InputError(f"HierTCNConfig.{name} is {share}; expected 0 <= {name} < 1")
        for name, known in (
            ("connection", CONNECTIONS),
            ("aggregate", AGGREGATES),
            ("head", HEADS),
        ):
            if getattr(self, name) not in known:
                raise InputError(
                    f"HierTCNConfig.{name} is {getattr(self, name)!r}; expected one of "
                    f"{', '.join(known)}"
                )

    @classmethod
    def paper(cls, item_dim: int) -> "HierTCNConfig":
        """Return the setting of section 4.2.3: GRU 4 x 128, TCN 4 x 2 of 128 filters, kernel 5.

        Full connection and mean aggregate. The paper gives no rate of its dropout; here it is 0.
        """
        return cls(
            item_dim=item_dim,
            hidden=128,
            gru_layers=4,
            tcn_blocks=4,
            kernel=5,
            filters=128,
            connection="full",
            aggregate="mean",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        names = {name: list(getattr(self, name)) for name in _NAMES}
        return {**asdict(self), **names}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HierTCNConfig":
        """Rebuild a configuration from ``to_dict``'s result.

        Raises:
            InputError: a field is unknown, missing or out of range.
        """
        try:
            return cls(**{**values, **{name: tuple(values.get(name, ())) for name in _NAMES}})
        except TypeError as error:
            raise InputError(
                f"the model configuration does not describe a HierTCN ({error}); expected the "
                f"fields {', '.join(cls.__dataclass_fields__)}: retrain or restore config.json"
            ) from None
