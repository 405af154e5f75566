"""The rows of the item-to-item benchmark: a name, its options, and how its vectors are made.

Every method sees only the known days. One with several options is given each of them on the
validation cuts and keeps the one with the best mean MRR there; the test cut is asked once.

A question is asked as often as it comes up, so how popular an answer is matters beside how well it
goes with the query. Every method may therefore add two popularities' logarithms to its scores: of
recent events, and of events halved as slowly as the graph's edges, which co-occurrence counts hold
anyway and vectors trained with negatives drawn by popularity do not. Weights and half-life are
chosen like the other options; for vectors this is one more coordinate, as in the item table
(``hiertcn.items.prior``). The table also says what a method reaches without. To add a row, add a
line to `ROWS`.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.item_embeddings_data import LogName, RetrievalCase
from hiertcn.errors import InputError
from hiertcn.graph.walks import importance_neighborhoods
from hiertcn.training.item_encoder import train_item_encoder
from hiertcn.training.item_encoder_options import ItemEncoderOptions
from hiertcn.training.item_inference import embed_items
from models.graphsage import GraphSAGE, GraphSAGEConfig

DIM: Final = 128

Options = Mapping[str, Any]

_GRAPH_HALF_LIVES: Final[Mapping[LogName, float]] = {
    "online_retail": 30.0,
    "globo_news": 1.0,
    "simulator": 30.0,
}
_RECENT_HALF_LIVES: Final[Mapping[LogName, Sequence[float]]] = {
    "online_retail": (1.5, 3.0, 7.0),
    "globo_news": (0.05, 0.1, 0.25),
    "simulator": (1.5, 3.0, 7.0),
}
"""Days: news are read for hours, a wholesaler's season lasts weeks."""
_SMALLEST_SHARE: Final = 0.01
"""Added to each item's popularity, in shares of the mean, so that its logarithm exists."""
_DAY_US: Final = 86_400_000_000


class Scores(Protocol):
    """How well each item goes with some queries."""

    def __call__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Queries int64 [n] -> float32 [n, items], writable; higher is better."""


Build = Callable[[RetrievalCase, Options, Path], Scores]
"""Makes the scores from what is known; the folder is the method's own."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table.

    Attributes:
        build: makes its scores.
        options: those to choose from, of each log.
        recent_weights: of the recent popularity's logarithm; 0 leaves it out.
        steady_weights: of the other one's.
    """

    build: Build
    options: Callable[[LogName], Sequence[Options]] = lambda _: ({},)
    recent_weights: Sequence[float] = (0.0,)
    steady_weights: Sequence[float] = (0.0,)


@dataclass(frozen=True, kw_only=True)
class Prior:
    """What popularity adds to a score.

    Attributes:
        recent_weight: of the logarithm of events halved every ``half_life_days``.
        half_life_days: of recent events.
        steady_weight: of the logarithm of events halved as slowly as the graph's edges.
    """

    recent_weight: float = 0.0
    half_life_days: float = 1.0
    steady_weight: float = 0.0

    def of_items(self, case: RetrievalCase) -> NDArray[np.float32]:
        """Return what it adds to each item, float32 [items]."""
        prior = np.zeros(len(case.index))
        if self.recent_weight:
            prior += self.recent_weight * _log_popularity(case, self.half_life_days)
        if self.steady_weight:
            prior += self.steady_weight * _log_popularity(case, _GRAPH_HALF_LIVES[case.name])
        return prior.astype(np.float32)


def _log_popularity(case: RetrievalCase, half_life_days: float) -> NDArray[np.float64]:
    times = case.sessions.timestamps_us
    age = (int(times.max()) - np.asarray(times)) / _DAY_US
    decayed = np.bincount(
        case.sessions.item_rows, weights=0.5 ** (age / half_life_days), minlength=len(case.index)
    )
    logs: NDArray[np.float64] = np.log(decayed + _SMALLEST_SHARE * decayed.mean())
    return logs


def priors(method: Method, log: LogName) -> list[Prior]:
    """Return the priors to choose from; the first is none where the method may do without."""
    return [
        Prior(recent_weight=recent, half_life_days=days, steady_weight=steady)
        for steady in method.steady_weights
        for recent in method.recent_weights
        for days in (_RECENT_HALF_LIVES[log] if recent else (1.0,))
    ]


def _by_vectors(queries: NDArray[np.float32], answers: NDArray[np.float32] | None = None) -> Scores:
    of_items = np.ascontiguousarray((queries if answers is None else answers).T)

    def scores(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = queries[rows] @ of_items
        return found

    return scores


def _unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float32] = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return unit


def random_vectors(items: int) -> NDArray[np.float32]:
    """Return directions drawn evenly, float32 [items, DIM]."""
    return _unit(np.random.default_rng(0).standard_normal((items, DIM), np.float32))


def feature_vectors(case: RetrievalCase) -> NDArray[np.float32]:
    """Return the items' features as unit vectors, float32 [items, features]; 0 where missing."""
    return _unit(np.where(case.features.present[:, None], case.features.values, 0.0))


def encoder_vectors(
    case: RetrievalCase, folder: Path, config: Options, training: Options
) -> NDArray[np.float32]:
    """Train the item encoder on what is known; return its vectors, float32 [items, DIM].

    Args:
        case: what is known.
        folder: for the encoder.
        config: what differs from `GraphSAGEConfig`'s defaults.
        training: what differs from `ItemEncoderOptions`' defaults.
    """
    graph = case.graph(_GRAPH_HALF_LIVES[case.name])
    features = case.features if case.features.names else None
    options = ItemEncoderOptions(**training)
    torch.manual_seed(options.seed)
    sizes: dict[str, Any] = {
        "items": graph.items,
        "feature_dim": len(case.features.names),
        "dim": DIM,
        "hidden": DIM,
    }
    encoder = GraphSAGE(GraphSAGEConfig(**(sizes | dict(config))))
    walks = importance_neighborhoods(graph, seed=options.seed, threads=1, progress=False)
    train_item_encoder(encoder, features, walks, graph, folder, options)
    return embed_items(encoder, features, walks, progress=False)


def _random(case: RetrievalCase, options: Options, folder: Path) -> Scores:
    return _by_vectors(random_vectors(len(case.index)))


def _features(case: RetrievalCase, options: Options, folder: Path) -> Scores:
    return _by_vectors(feature_vectors(case))


def _popularity(case: RetrievalCase, options: Options, folder: Path) -> Scores:
    # Nothing but the prior: with weight 0 all items tie, and a tie never helps.
    return lambda rows: np.zeros((len(rows), len(case.index)), np.float32)


def _neighbors(case: RetrievalCase, options: Options, folder: Path) -> Scores:
    graph = case.graph(options["half_life_days"])
    smallest = float(graph.weights.min(initial=1.0))

    def scores(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        # Logarithms, so that the prior weighs shares and not counts.
        found = np.full((len(rows), graph.items), np.log(1e-3 * smallest), np.float32)
        for place, row in enumerate(rows):
            part = slice(graph.indptr[row], graph.indptr[row + 1])
            found[place, graph.indices[part]] = np.log(graph.weights[part])
        return found

    return scores


def _item2vec(case: RetrievalCase, options: Options, folder: Path) -> Scores:
    rows = case.sessions.item_rows.astype(str).tolist()
    offsets = case.sessions.session_offsets.tolist()
    try:
        from gensim.models import Word2Vec
    except ImportError as error:
        raise InputError(
            f"item2vec needs the extra benchmarks ({error}); install 'hiertcn[benchmarks]' or "
            "leave the row out"
        ) from error
    sentences = [
        rows[start:stop] for start, stop in itertools.pairwise(offsets) if stop - start > 1
    ]
    model = Word2Vec(
        sentences,
        vector_size=options["dim"],
        window=options["window"],
        epochs=options["epochs"],
        sg=1,
        negative=5,
        min_count=1,
        workers=1,
        seed=0,
    )
    trained = np.array([int(name) for name in model.wv.index_to_key])
    vectors = np.zeros((len(case.index), DIM), np.float32)
    vectors[trained] = model.wv.vectors
    return _by_vectors(_unit(vectors))


def _encoder(case: RetrievalCase, options: Options, folder: Path) -> Scores:
    return _by_vectors(encoder_vectors(case, folder, options["config"], options["training"]))


def _neighbor_options(log: LogName) -> Sequence[Options]:
    days = _GRAPH_HALF_LIVES[log]
    return [{"half_life_days": half_life} for half_life in (0.0, days / 4, days)]


def _item2vec_options(log: LogName) -> Sequence[Options]:
    if log == "globo_news":
        return [{"dim": DIM, "window": 5, "epochs": epochs} for epochs in (2, 5)]
    return [{"dim": DIM, "window": size, "epochs": size} for size in (5, 10)]


def _encoder_options(**config: Any) -> Sequence[Options]:
    # Written out, so that a row measured with other defaults is measured again.
    return [{"config": {"dim": DIM, **config}, "training": asdict(ItemEncoderOptions())}]


class _Weights(TypedDict):
    recent_weights: Sequence[float]
    steady_weights: Sequence[float]


_OF_COSINES: Final[_Weights] = {
    "recent_weights": (0.0, 0.025, 0.05, 0.1, 0.2, 0.3),
    "steady_weights": (0.0, 0.05, 0.1),
}
_OF_LOGARITHMS: Final[_Weights] = {
    "recent_weights": (0.0, 0.125, 0.25, 0.5, 1.0),
    "steady_weights": (0.0, 0.5, 1.0),
}

OURS: Final = "PinSage encoder (ours)"

ROWS: Final[Mapping[str, Method]] = {
    "random vectors": Method(build=_random, **_OF_COSINES),
    "popularity": Method(build=_popularity, **_OF_LOGARITHMS),
    "raw features": Method(build=_features, **_OF_COSINES),
    "co-occurrence neighbours": Method(
        build=_neighbors, options=_neighbor_options, **_OF_LOGARITHMS
    ),
    "item2vec": Method(build=_item2vec, options=_item2vec_options, **_OF_COSINES),
    "GraphSAGE, mean pooling": Method(
        build=_encoder,
        options=lambda _: _encoder_options(pooling="graphsage"),
        **_OF_COSINES,
    ),
    OURS: Method(build=_encoder, options=lambda _: _encoder_options(), **_OF_COSINES),
}
"""In the order printed."""
