"""Step 2: which items are interacted with together."""

from kfp.dsl import Artifact, Dataset, Input, Output


def build_item_graph(
    lineage: str,
    edge_store: str,
    graph_window_s: float,
    graph_window_days: int,
    graph_half_life_days: float,
    graph_neighbors: int,
    snapshot: Input[Dataset],
    item_index: Input[Artifact],
    graph: Output[Artifact],
) -> str:
    """Count co-interactions day by day and merge the newest days into a weighted graph.

    Args:
        lineage: lineage of the snapshot.
        edge_store: folder with each day's counts, kept between runs; empty keeps none.
        graph_window_s: seconds within which two interactions of a user connect their items.
        graph_window_days: days merged.
        graph_half_life_days: age in days at which a connection counts half.
        graph_neighbors: strongest connections kept of each item.
        snapshot: the ingested log.
        item_index: id <-> row.
        graph: the graph (CSR, memory-mapped) with its statistics.

    Returns:
        The lineage of the graph.
    """
    from components.step import step

    with step("build_item_graph", locals()) as running:
        import tempfile
        from pathlib import Path

        from hiertcn.graph.edges import build_edges
        from hiertcn.graph.merge import merge_edges
        from hiertcn.graph.options import GraphOptions
        from hiertcn.items.index import IdIndex

        options = GraphOptions(
            window_s=graph_window_s,
            window_days=graph_window_days,
            half_life_days=graph_half_life_days,
            top_n=graph_neighbors,
        )
        with tempfile.TemporaryDirectory() as scratch:
            store = Path(edge_store or scratch)
            build_edges(Path(snapshot.path) / "events", store, options)
            merge_edges(store, IdIndex.open(Path(item_index.path)), Path(graph.path), options)
    return running.lineage
