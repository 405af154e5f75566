"""Step 3: which items are interacted with together."""

from kfp.dsl import Artifact, Dataset, Input, Output


def build_item_graph(
    lineage: str,
    sessions_lineage: str,
    edge_store: str,
    graph_window_s: float,
    graph_window_days: int,
    graph_half_life_days: float,
    graph_neighbors: int,
    graph_engine: str,
    spark_master: str,
    graph_memory: str,
    snapshot: Input[Dataset],
    item_index: Input[Artifact],
    sessions: Input[Dataset],
    graph: Output[Artifact],
    training_graph: Output[Artifact],
) -> str:
    """Count co-interactions day by day and merge the newest days into a weighted graph.

    Twice: up to the newest day, for serving, and up to the day before the test sessions start, for
    training and evaluation, so that no measured interaction has shaped an item's vector.

    Args:
        lineage: lineage of the snapshot.
        sessions_lineage: lineage of the sessions.
        edge_store: folder with each day's counts, kept between runs; empty keeps none.
        graph_window_s: seconds within which two interactions of a user connect their items.
        graph_window_days: days merged.
        graph_half_life_days: age in days at which a connection counts half.
        graph_neighbors: strongest connections kept of each item.
        graph_engine: compiled, duckdb or spark; the edges are the same.
        spark_master: master URL or Spark Connect URL; empty runs Spark inside this step.
        graph_memory: what events and pairs or a Spark inside this step may hold, such as 4GB.
        snapshot: the ingested log.
        item_index: id <-> row.
        sessions: the session store, for where the test sessions start.
        graph: the graph (CSR, memory-mapped) with its statistics.
        training_graph: the same without the days of the test sessions.

    Returns:
        The lineage of both graphs.
    """
    from components.step import step

    with step("build_item_graph", locals()) as running:
        import logging
        import tempfile
        from dataclasses import replace
        from datetime import UTC, datetime, timedelta
        from pathlib import Path

        from hiertcn.events.ingest import ALL_EVENTS
        from hiertcn.graph.edges import build_edges
        from hiertcn.graph.merge import merge_edges
        from hiertcn.graph.options import GraphOptions
        from hiertcn.items.index import IdIndex
        from hiertcn.sessions.split import split_by_time
        from hiertcn.sessions.store import SessionStore

        options = GraphOptions(
            window_s=graph_window_s,
            window_days=graph_window_days,
            half_life_days=graph_half_life_days,
            top_n=graph_neighbors,
            engine=graph_engine,
            spark_master=spark_master,
            memory_limit=graph_memory,
        )
        events = Path(snapshot.path) / ALL_EVENTS
        if not events.exists():
            events = Path(snapshot.path) / "events"
        test_start_us = split_by_time(SessionStore.open(Path(sessions.path))).test_start_us
        test_day = datetime.fromtimestamp(test_start_us / 1e6, tz=UTC)
        as_of = f"{test_day - timedelta(days=1):%Y-%m-%d}"
        if as_of < min(path.name for path in events.iterdir()).removeprefix("date="):
            logging.getLogger("components.build_item_graph").warning(
                "the log is too short to keep its test sessions out of the item graph; the "
                "evaluation will look better than it is"
            )
            as_of = ""
        with tempfile.TemporaryDirectory() as scratch:
            store = Path(edge_store or scratch)
            build_edges(events, store, options)
            index = IdIndex.open(Path(item_index.path))
            merge_edges(store, index, Path(training_graph.path), replace(options, as_of=as_of))
            csr = merge_edges(store, index, Path(graph.path), options)
        graph.metadata.update(items=csr.items, edges=len(csr.indices))
    return running.lineage
