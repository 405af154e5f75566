"""The HierTCN paper's own numbers (You et al., WWW 2019, Tables 2 to 6 and section 4.3.4).

Keys are our names of rows and metrics; a value that the paper leaves out is missing here.
"""

from collections.abc import Mapping
from typing import Final, Literal

Dataset = Literal["XING", "Pinterest"]
Numbers = Mapping[str, Mapping[str, float]]


def _columns(names: tuple[str, ...], **metrics: tuple[float | None, ...]) -> Numbers:
    """Turn the paper's rows of metrics into rows of models."""
    titles = {"recall_1": "recall@1", "recall_5": "recall@5", "recall_10": "recall@10"}
    return {
        name: {
            titles.get(metric, metric): value
            for metric, values in metrics.items()
            if (value := values[place]) is not None
        }
        for place, name in enumerate(names)
    }


_MODELS: Final = ("HierTCN", "HierGRU", "HRNN", "TCN", "GRU", "MV", "MaxItem")

COLD_START: Final[Mapping[Dataset, Numbers]] = {
    "XING": _columns(
        _MODELS,
        recall_10=(0.139, 0.105, 0.113, 0.108, 0.124, 0.107, None),
        mrr=(0.071, 0.037, 0.040, 0.038, 0.043, None, None),
        mrp=(0.121, 0.161, 0.149, 0.198, 0.141, None, None),
    ),
    "Pinterest": _columns(
        _MODELS,
        recall_1=(0.206, 0.184, 0.174, 0.194, 0.195, 0.1658, 0.1487),
        recall_5=(0.663, 0.639, 0.619, 0.653, 0.655, 0.6120, 0.5843),
        recall_10=(0.855, 0.839, 0.828, 0.850, 0.852, 0.8173, 0.7921),
        mrr=(0.402, 0.380, 0.366, 0.391, 0.392, 0.3593, 0.3400),
        mrp=(0.304, 0.326, 0.338, 0.313, 0.311, 0.3484, 0.3724),
    ),
}
"""Table 2."""

WARM_START: Final[Mapping[Dataset, Numbers]] = {
    "Pinterest": _columns(
        ("HierTCN", "HRNN", "TCN", "MV", "MaxItem"),
        recall_1=(0.202, 0.188, 0.183, 0.174, 0.155),
        recall_5=(0.667, 0.650, 0.641, 0.631, 0.600),
        recall_10=(0.855, 0.848, 0.838, 0.830, 0.801),
        mrr=(0.399, 0.386, 0.379, 0.370, 0.348),
        mrp=(0.313, 0.324, 0.336, 0.346, 0.374),
    ),
}
"""Table 3; the paper has no warm start on XING."""

EPOCH_SECONDS: Final[Mapping[str, float]] = {
    "HierTCN": 295.3,
    "HierGRU": 747.8,
    "HRNN": 693.1,
    "TCN": 254.0,
    "GRU": 776.8,
}
"""Table 4, Pinterest, on the paper's GPU."""

LOSSES: Final[Mapping[Dataset, Numbers]] = {
    "Pinterest": _columns(
        ("l2", "nce", "bpr", "hinge"),
        recall_1=(0.167, 0.192, 0.183, 0.201),
        recall_5=(0.611, 0.642, 0.632, 0.657),
        recall_10=(0.817, 0.838, 0.832, 0.851),
        mrr=(0.360, 0.386, 0.377, 0.396),
        mrp=(0.349, 0.322, 0.331, 0.309),
    ),
}
"""Table 5: cold start, with a tenth of the training data."""

LOSS_TRAINING_SHARE: Final = 0.1

REGULARIZATION: Final[Mapping[Dataset, Numbers]] = {
    "XING": _columns(
        ("none", "dropout", "batch norm", "dropout + batch norm"),
        recall_10=(0.139, 0.129, 0.145, 0.147),
        mrr=(0.071, 0.066, 0.073, 0.075),
        mrp=(0.121, 0.120, 0.109, 0.107),
    ),
}
"""Table 6: cold start."""

MEMORY_SAVED_AT_MOST: Final = 0.9
"""Section 4.3.4: the data memory of HierTCN is up to 90% below that of TCN."""
