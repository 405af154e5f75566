"""Every parameter of the daily pipeline: name, default, unit and meaning, in one place.

The pipeline's inputs (daily.py), their descriptions in the compiled YAML, the command line's
options and their help (__main__.py) are all made from `PARAMETERS`. A component's argument of the
same name receives the value; its own signature carries no default.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from hiertcn.errors import InputError

Value = str | int | float | bool | list[str]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One pipeline parameter.

    ``name`` is the pipeline's input and the components' argument; ``option`` the command line's
    option where it is not the name with dashes. The type is the default's; a text with ``choices``
    must be one of them.
    """

    name: str
    default: Value
    help: str
    group: str
    unit: str = ""
    choices: tuple[str, ...] = ()
    option: str = ""
    required: bool = False

    @property
    def flag(self) -> str:
        """The command line's option."""
        return self.option or "--" + self.name.replace("_", "-")

    @property
    def description(self) -> str:
        """The help with the unit, for the command line and for Kubeflow's form."""
        unit = self.unit or " or ".join(self.choices)
        return f"{self.help} [{unit}]" if unit else self.help


_INPUT = "What to read"
_LOG = "How to read it"
_FILTER = "What to keep of it"
_GRAPH = "Graph and item encoder"
_MODEL = "Sessions and HierTCN"
_GATE = "Evaluation and gate"
_RELEASE = "Release"

PARAMETERS: Final = (
    Parameter(
        name="events",
        default="",
        required=True,
        group=_INPUT,
        help="Event log: CSV or parquet; a file, a glob, a partitioned folder or any fsspec URL.",
    ),
    Parameter(
        name="items",
        default="",
        group=_INPUT,
        help="Items file, folder or URL with their features; empty if there is none.",
    ),
    Parameter(
        name="data_date",
        default="",
        group=_INPUT,
        unit="UTC date YYYY-MM-DD, or RFC 3339 instant",
        help="Read events up to the end of that day, or before that instant; empty reads all.",
    ),
    Parameter(
        name="oracle",
        default="",
        group=_INPUT,
        help="The simulator's oracle folder, for the distance to the best possible ranking.",
    ),
    Parameter(name="user_column", default="user_id", group=_LOG, help="Column of the user ids."),
    Parameter(
        name="item_column",
        default="item_id",
        group=_LOG,
        help="Column of the item ids, in the events and in the items.",
    ),
    Parameter(
        name="timestamp_column", default="timestamp", group=_LOG, help="Column of the times."
    ),
    Parameter(
        name="event_type_column",
        default="event_type",
        group=_LOG,
        help="Column of the event types; it may be absent.",
    ),
    Parameter(
        name="impressions_column",
        default="impressions",
        group=_LOG,
        help="Column listing the items shown with the event; it may be absent.",
    ),
    Parameter(
        name="timestamp_unit",
        default="auto",
        group=_LOG,
        unit="auto, s, ms, us or ns",
        help="Unit of integer times; auto infers it where only one fits.",
    ),
    Parameter(
        name="event_types",
        option="--event-type",
        default=[],
        group=_FILTER,
        help="Event type that counts as an interaction; repeat for several. None keeps all.",
    ),
    Parameter(
        name="item_filter",
        default="",
        group=_FILTER,
        unit="COLUMN=VALUE, or a boolean column",
        help="Keep only items of which this holds in the items file.",
    ),
    Parameter(
        name="min_user_interactions",
        default=10,
        group=_FILTER,
        unit="interactions",
        help="Drop users with fewer.",
    ),
    Parameter(
        name="max_user_interactions",
        default=1000,
        group=_FILTER,
        unit="interactions",
        help="Drop users with more: mostly robots.",
    ),
    Parameter(
        name="min_item_interactions",
        default=50,
        group=_FILTER,
        unit="interactions",
        help="Drop items with fewer.",
    ),
    Parameter(
        name="session_gap_s",
        option="--session-gap",
        default=1800.0,
        group=_MODEL,
        unit="seconds",
        help="A longer pause of a user ends the session.",
    ),
    Parameter(
        name="feature_columns",
        option="--feature-column",
        default=[],
        group=_GRAPH,
        help="Item column to use as a feature; repeat for several. None uses all usable ones.",
    ),
    Parameter(
        name="filter_columns",
        option="--filter-column",
        default=[],
        group=_GRAPH,
        help="Item column that requests may filter by; repeat for several. None takes all usable "
        "ones.",
    ),
    Parameter(
        name="graph_window_s",
        default=600.0,
        group=_GRAPH,
        unit="seconds",
        help="Two interactions of a user no further apart connect their items.",
    ),
    Parameter(
        name="graph_window_days",
        default=90,
        group=_GRAPH,
        unit="days",
        help="Days of the log that the graph is made of.",
    ),
    Parameter(
        name="graph_half_life_days",
        default=30.0,
        group=_GRAPH,
        unit="days",
        help="Age at which a connection counts half.",
    ),
    Parameter(
        name="graph_neighbors",
        default=50,
        group=_GRAPH,
        unit="items",
        help="Strongest connections kept of each item.",
    ),
    Parameter(
        name="graph_engine",
        default="compiled",
        choices=("compiled", "duckdb", "spark"),
        group=_GRAPH,
        help="What counts the graph's edges, all alike; spark needs the extra of that name.",
    ),
    Parameter(
        name="spark_master",
        default="",
        group=_GRAPH,
        unit="master URL, or sc:// for Spark Connect",
        help="Where Spark runs; empty runs it inside the step.",
    ),
    Parameter(
        name="graph_memory",
        default="4GB",
        group=_GRAPH,
        unit="size",
        help="Memory for events and pairs, or of Spark inside the step, while edges are counted; "
        "the rest spills to disk.",
    ),
    Parameter(
        name="edge_store",
        default="",
        group=_GRAPH,
        unit="folder",
        help="Where each day's connections are kept between runs, so that a day costs a day; "
        "empty recounts all days. A local run keeps them in its work directory.",
    ),
    Parameter(
        name="item_dim",
        default=64,
        group=_GRAPH,
        unit="coordinates",
        help="Size of an item's embedding, without the popularity coordinate.",
    ),
    Parameter(
        name="encoder_pooling",
        default="importance",
        choices=("importance", "mean", "max", "graphsage"),
        group=_GRAPH,
        help="How the item encoder sums up an item's neighbors: PinSage's mean weighted by "
        "importance, the plain mean, the maximum, or GraphSAGE's mean without a layer before it.",
    ),
    Parameter(
        name="encoder_epochs",
        default=5,
        group=_GRAPH,
        unit="epochs",
        help="The item encoder trains at most this long; it stops early.",
    ),
    Parameter(
        name="align_items",
        default="no",
        choices=("no", "procrustes"),
        group=_GRAPH,
        help="Rotate the new embeddings to lie closest to those that serve (orthogonal "
        "Procrustes); the report says how far they lie either way.",
    ),
    Parameter(
        name="item_table_dtype",
        default="float16",
        group=_GRAPH,
        unit="float16 or float32",
        help="Element type of the item table.",
    ),
    Parameter(
        name="neighbor_vectors",
        default="float16",
        choices=("float16", "int8"),
        group=_GRAPH,
        help="How the nearest-neighbor index stores vectors. int8 takes half the memory, and its "
        "candidates are ordered by the item table's own vectors.",
    ),
    Parameter(
        name="configuration",
        default="best",
        choices=("best", "paper"),
        group=_MODEL,
        help="HierTCN with memory and freshness terms beside the dot product, or as in its paper.",
    ),
    Parameter(
        name="item_vectors",
        default="auto",
        choices=("auto", "frozen", "fine-tuned"),
        group=_MODEL,
        help="Whether HierTCN takes the items' embeddings as they are or trains them further; auto "
        "fine-tunes them in the best configuration and not in the paper's.",
    ),
    Parameter(
        name="max_epochs",
        default=20,
        group=_MODEL,
        unit="epochs",
        help="HierTCN trains at most this long; it stops early.",
    ),
    Parameter(
        name="max_steps",
        default=0,
        group=_MODEL,
        unit="steps",
        help="HierTCN trains for at most this many steps; 0 sets no limit.",
    ),
    Parameter(
        name="patience",
        default=3,
        group=_MODEL,
        unit="epochs",
        help="Stop after this many epochs without a better validation MRR.",
    ),
    Parameter(
        name="learning_rate", default=2e-3, group=_MODEL, help="Adam's learning rate of HierTCN."
    ),
    Parameter(
        name="hidden",
        default=128,
        group=_MODEL,
        unit="coordinates",
        help="Size of a GRU layer's state.",
    ),
    Parameter(
        name="lanes",
        default=0,
        group=_MODEL,
        unit="users",
        help="Users trained on side by side: the queues of the mini-batch generator; 0 chooses so "
        "that a step holds about 512 interactions.",
    ),
    Parameter(
        name="sessions_per_step",
        default=4,
        group=_MODEL,
        unit="sessions",
        help="Sessions of each lane in one step; gradients reach no further back.",
    ),
    Parameter(
        name="checkpoint_store",
        default="",
        group=_MODEL,
        unit="folder",
        help="Where an unfinished training keeps its checkpoint, so that the next try resumes it; "
        "empty starts over. A local run keeps it in its work directory.",
    ),
    Parameter(
        name="seed", default=0, group=_MODEL, help="Seed of everything random in the pipeline."
    ),
    Parameter(
        name="candidates",
        default="auto",
        group=_GATE,
        unit="auto, impressions, catalogue or sample:N",
        help="What a target is ranked against; auto takes the impressions where they are known.",
    ),
    Parameter(
        name="max_requests",
        default=20_000,
        group=_GATE,
        unit="interactions",
        help="Evaluate on a random sample of at most this many.",
    ),
    Parameter(
        name="tolerance",
        default=0.02,
        group=_GATE,
        unit="share of the other's MRR",
        help="How much worse than the serving release the new one may be.",
    ),
    Parameter(
        name="serving_precision",
        default="float32",
        choices=("float32", "int8"),
        group=_RELEASE,
        help="int8 serves a quantized TCN if it has at least 99% of the best 20 items in common "
        "with the float32 one, and else that one; parity.json says which.",
    ),
    Parameter(
        name="repository",
        default="repository",
        group=_RELEASE,
        unit="folder",
        help="Release repository to publish into and to warm-start from.",
    ),
    Parameter(
        name="sidecar",
        default="",
        group=_RELEASE,
        unit="host:port",
        help="Sidecar that activates the release; empty flips the repository's pointer, which "
        "sidecars on it follow.",
    ),
    Parameter(
        name="keep_releases",
        default=5,
        group=_RELEASE,
        unit="releases",
        help="Newest releases to keep; the current and the previous one always stay.",
    ),
)

BY_NAME: Final[Mapping[str, Parameter]] = {item.name: item for item in PARAMETERS}


def complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all parameters: the given values, and defaults for the rest.

    Integers may be given as floats (Kubeflow's number type is a float).

    Raises:
        InputError: a name is unknown, a value has the wrong type, or a required one is empty.
    """
    unknown = sorted(set(given) - set(BY_NAME))
    if unknown:
        raise InputError(
            f"the pipeline has no parameter {unknown[0]!r}; it has {', '.join(sorted(BY_NAME))}"
        )
    values = {item.name: _checked(item, given.get(item.name, item.default)) for item in PARAMETERS}
    for item in PARAMETERS:
        if item.required and not values[item.name]:
            raise InputError(f"{item.flag} is empty; expected: {item.help}")
    return values


def _checked(item: Parameter, value: Any) -> Any:
    kind = type(item.default)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is list and isinstance(value, tuple):
        return list(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{item.flag} is {value!r}; expected {kind.__name__}: {item.description}")
    if item.choices and value not in item.choices:
        raise InputError(f"{item.flag} is {value!r}; expected {' or '.join(item.choices)}")
    return value
