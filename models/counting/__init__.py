"""Rankers that count instead of learning weights: the baselines that every network has to pass.

All share one interface (`CountingRanker`): constructed with the histories and hyper-parameters,
``fit`` counts the training sessions, ``score`` and ``recommend`` answer requests.
"""

from models.counting.item_knn import ItemKNN
from models.counting.markov import Markov
from models.counting.popularity import LivePopularity, PersonalPopularity, Popularity
from models.counting.ranker import CountingRanker
from models.counting.reminder import Reminder
from models.counting.stan import STAN, VSTAN
from models.counting.vsknn import VSKNN

__all__ = [
    "STAN",
    "VSKNN",
    "VSTAN",
    "CountingRanker",
    "ItemKNN",
    "LivePopularity",
    "Markov",
    "PersonalPopularity",
    "Popularity",
    "Reminder",
]
