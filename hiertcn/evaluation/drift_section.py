"""The report's section on how far the item vectors moved since the serving release."""

from collections.abc import Mapping
from typing import Any

from hiertcn.evaluation.report_parts import Cell, Row, Section, Table, number


def drift_section(drift: Mapping[str, Any]) -> Section:
    """Return how today's item vectors lie to those that serve.

    Args:
        drift: the fields of :class:`hiertcn.items.alignment.Drift`.
    """
    used = "rotated" if drift["aligned"] else "as the encoder gave them"
    return Section(
        "drift",
        "Item vectors since the serving release",
        paragraphs=(
            f"{number(drift['items'])} items of both releases are compared. A rotation changes no "
            "score within a release, but weights trained on the earlier vectors read each "
            f"coordinate by itself. This release uses the vectors {used}.",
        ),
        tables=(
            Table(
                "How far the items moved",
                (
                    "Vectors",
                    "Mean cosine to the earlier vector",
                    "Tenth percentile",
                    "Same 10 nearest",
                ),
                tuple(
                    Row(
                        title,
                        (
                            Cell(number(drift[name])),
                            Cell(number(drift[f"{name}_p10"])),
                            Cell(number(drift["neighbor_overlap"])),
                        ),
                        "challenger" if drift["aligned"] == is_aligned else "",
                    )
                    for title, name, is_aligned in (
                        ("As the encoder gave them", "cosine", False),
                        ("Rotated (orthogonal Procrustes)", "aligned_cosine", True),
                    )
                ),
            ),
        ),
    )
