"""The catalogue of a simulated log: items with latent topics, features that reflect them, and
the plain production policy that shows items to users.

Every item is a unit vector in a latent space of ``topics`` topic coordinates and a few style
coordinates. Topics follow each other: the transition matrix sends each topic to its successor and
keeps the style, so what comes next in a session is not what came before. Costs a few hundred bytes
an item. Does not know any user; behaviour is in ``simulated_behavior.py``.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hiertcn.events.columns import ITEM_ID

STYLE_DIM = 8

_SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo")
_WORDS_PER_TOPIC = 12
_WORDS_PER_STYLE = 3
_COMMON_WORDS = 30


@dataclass(frozen=True)
class World:
    """All that is fixed before the first user arrives.

    Attributes:
        vectors: float32 [items, topics + STYLE_DIM], unit length: each item's latent vector.
        topic: int64 [items], the main topic of each item.
        transition: float32 [dim, dim]; ``v @ transition`` is where interest moves after ``v``.
        successor: int64 [topics], the topic that follows each topic.
        log_popularity: float32 [items], mean 0.
    """

    vectors: NDArray[np.float32]
    topic: NDArray[np.int64]
    transition: NDArray[np.float32]
    successor: NDArray[np.int64]
    log_popularity: NDArray[np.float32]
    _by_topic: NDArray[np.int64]
    _cumulative: NDArray[np.float64]
    _topic_start: NDArray[np.int64]

    @property
    def items(self) -> int:
        """The number of items."""
        return len(self.topic)

    @property
    def topics(self) -> int:
        """The number of topics."""
        return len(self.successor)

    def draw_popular(
        self, rng: np.random.Generator, topics: NDArray[np.int64] | None, size: int
    ) -> NDArray[np.int64]:
        """Draw items by popularity, int64 [size]; within ``topics`` (int64 [size]) if given."""
        if topics is None:
            topic_range = self._cumulative[[0, -1]]
        else:
            topic_range = self._cumulative[self._topic_start[np.stack([topics, topics + 1])]]
        low, high = topic_range
        point = low + rng.random(size) * (high - low)
        slot = np.searchsorted(self._cumulative, point, side="right") - 1
        drawn: NDArray[np.int64] = self._by_topic[np.minimum(slot, self.items - 1)]
        return drawn


def build_world(rng: np.random.Generator, *, items: int, topics: int) -> World:
    """Draw the items' topics, styles and popularity; every topic gets at least one item."""
    topics = min(topics, items)
    weight = rng.dirichlet(np.full(topics, 8.0))
    topic = np.concatenate([np.arange(topics), rng.choice(topics, size=items - topics, p=weight)])
    topic = rng.permutation(topic).astype(np.int64)
    second = rng.integers(0, topics, size=items)

    vectors = np.zeros((items, topics + STYLE_DIM), dtype=np.float32)
    vectors[np.arange(items), topic] += 0.8
    vectors[np.arange(items), second] += 0.25
    style = rng.standard_normal((items, STYLE_DIM)).astype(np.float32)
    vectors[:, topics:] = 0.55 * style / np.linalg.norm(style, axis=1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    # One cycle through all topics in random order: no topic follows itself.
    cycle = rng.permutation(topics)
    successor = np.empty(topics, dtype=np.int64)
    successor[cycle] = np.roll(cycle, -1)
    transition = np.eye(topics + STYLE_DIM, dtype=np.float32)
    transition[:topics, :topics] = 0.0
    transition[np.arange(topics), successor] = 1.0

    log_popularity = rng.normal(0.0, 0.7, size=items).astype(np.float32)
    by_topic = np.argsort(topic, kind="stable")
    popularity = np.exp(log_popularity[by_topic].astype(np.float64))
    return World(
        vectors=vectors,
        topic=topic,
        transition=transition,
        successor=successor,
        log_popularity=log_popularity - log_popularity.mean(),
        _by_topic=by_topic,
        _cumulative=np.concatenate([[0.0], np.cumsum(popularity)]),
        _topic_start=np.searchsorted(topic[by_topic], np.arange(topics + 1)),
    )


def item_ids(items: int) -> pa.Array:
    """Return the ids ``i0000000``, ``i0000001``, ... as Arrow strings."""
    return pa.array([f"i{item:07d}" for item in range(items)], pa.string())


def catalogue_table(rng: np.random.Generator, world: World, *, image_dim: int) -> pa.Table:
    """Return the items file: item_id, title, category, price, image (list<float32>[image_dim]).

    The image is a random projection of the latent vector plus noise; the title's words come from
    the item's topic, its strongest style and a common stock; the category names the topic, wrong
    for one item in twenty.
    """
    items, dim = world.vectors.shape
    projection = rng.standard_normal((dim, image_dim)).astype(np.float32)
    image = world.vectors @ projection
    image += 0.3 * rng.standard_normal(image.shape, dtype=np.float32)

    wrong = rng.random(items) < 0.05
    category = np.where(wrong, rng.integers(0, world.topics, size=items), world.topic)
    price = np.exp(1.5 + 0.1 * world.topic + rng.normal(0.0, 0.4, size=items)).round(2)
    return pa.table(
        {
            ITEM_ID: item_ids(items),
            "title": pa.array(_titles(rng, world), pa.string()),
            "category": pa.array([f"category-{topic:02d}" for topic in category], pa.string()),
            "price": pa.array(price, pa.float64()),
            "image": pa.FixedSizeListArray.from_arrays(pa.array(image.ravel()), image_dim).cast(
                pa.list_(pa.float32())
            ),
        }
    )


def _titles(rng: np.random.Generator, world: World) -> list[str]:
    stock = world.topics * _WORDS_PER_TOPIC
    style_stock = 2 * STYLE_DIM * _WORDS_PER_STYLE
    words = np.array(_vocabulary(rng, stock + style_stock + _COMMON_WORDS))
    style = world.vectors[:, world.topics :]
    strongest = np.abs(style).argmax(axis=1)
    positive = style[np.arange(world.items), strongest] > 0
    style_group = stock + (2 * strongest + positive) * _WORDS_PER_STYLE

    columns = [
        world.topic * _WORDS_PER_TOPIC + rng.integers(0, _WORDS_PER_TOPIC, size=world.items)
        for _ in range(3)
    ]
    columns.append(style_group + rng.integers(0, _WORDS_PER_STYLE, size=world.items))
    columns.append(stock + style_stock + rng.integers(0, _COMMON_WORDS, size=world.items))
    chosen = rng.permuted(np.stack(columns, axis=1), axis=1)
    return [" ".join(row) for row in words[chosen].tolist()]


def _vocabulary(rng: np.random.Generator, size: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < size:
        syllables = rng.choice(_SYLLABLES, size=int(rng.integers(2, 5)))
        words["".join(syllables.tolist())] = None
    return list(words)
