"""The report's section on a model's scoring terms: what each of them weighs, request by request.

An item's score is ``a x^T u + b log(1 + sum_k exp(w_k) f_k) + d s`` (models/scoring_terms.py), with
``w``, ``log a``, ``log b`` and ``d`` linear in what is known of the request. A linear map of four
numbers says little to a reader, so the section shows what it comes to for typical requests.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.evaluation.report_parts import Cell, Row, Section, Table, number
from hiertcn.sessions.memory import Histories
from hiertcn.sessions.request_features import context_of

_REQUESTS: Final = (
    ("A new user", 0, 0),
    ("First item, 20 before it", 20, 0),
    ("Third item of a first session", 2, 2),
    ("Third item, 20 before the session", 22, 2),
    ("Tenth item, 20 before the session", 29, 9),
)
"""Title, interactions remembered, and how many of them are of the running session."""

_TITLES: Final = {
    "transitions": "share of what follows the last items",
    "own_transitions": "share of what followed them in the user's own past",
    "past_items": "share of the user's past sessions that have it",
    "familiar_transitions": "share of what follows, if the user had it before",
    "live_transitions": "share of what everybody went on to, or began with, just now",
    "live_5m": "share of the last 5 minutes' interactions",
    "live_15m": "share of the last 15 minutes'",
    "live_1h": "share of the last hour's",
    "live_6h": "share of the last six hours'",
}
_SESSION_ITEMS: Final = "session_items"


def term_section(
    names: Sequence[str], weight: NDArray[np.floating[Any]], bias: NDArray[np.floating[Any]]
) -> Section:
    """Return the section.

    Args:
        names: the terms, in the order of the gate's outputs.
        weight: ``[terms + 2, context]``, the gate's.
        bias: ``[terms + 2]``; the last two outputs are ``log a`` and ``log b``.
    """
    gate = np.asarray(weight) @ _contexts().T + np.asarray(bias)[:, None]
    rows = [_row("dot product with the network's user embedding (a)", np.exp(gate[-2]))]
    rows.append(_row("logarithm of the mixture of shares (b)", np.exp(gate[-1])))
    for place, name in enumerate(names):
        if name == _SESSION_ITEMS:
            rows.append(_row("added to items of the running session (d)", gate[place]))
        else:
            title = f"in the mixture: {_TITLES.get(name, name)}"
            rows.append(_row(title, np.exp(gate[place])))
    return Section(
        "terms",
        "Scoring terms",
        paragraphs=(
            "Beside the network's dot product, an item's score counts what memory and the live "
            "counts say of it. The weights were fitted on validation sessions, which the network "
            "never saw; they depend on the request, so they are shown for typical ones.",
        ),
        tables=(Table("Fitted weights", tuple(title for title, _, _ in _REQUESTS), tuple(rows)),),
    )


def _contexts() -> NDArray[np.float32]:
    """Return the typical requests' contexts, ``[requests, context]``."""
    lengths = np.array([length for _, length, _ in _REQUESTS])
    total = int(lengths.sum())
    return context_of(
        Histories(
            rows=np.zeros(total, np.int32),
            sessions=np.zeros(total, np.int64),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            running=np.array([running for _, _, running in _REQUESTS]),
            asked_us=np.zeros(len(lengths), np.int64),
        )
    )


def _row(title: str, values: NDArray[np.floating[Any]]) -> Row:
    return Row(title, tuple(Cell(number(float(value))) for value in values))
