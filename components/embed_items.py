"""Step 5: embed every item into the item table."""

from kfp.dsl import Artifact, Dataset, Input, Model, Output


def embed_items(
    lineage: str,
    item_table_dtype: str,
    filter_columns: list[str],
    graph_half_life_days: float,
    seed: int,
    snapshot: Input[Dataset],
    item_index: Input[Artifact],
    sessions: Input[Dataset],
    graph: Input[Artifact],
    training_graph: Input[Artifact],
    features: Input[Artifact],
    item_encoder: Input[Model],
    item_table: Output[Artifact],
    training_table: Output[Artifact],
    item_layers: Output[Artifact],
    popularity: Output[Artifact],
    item_attributes: Output[Artifact],
) -> str:
    """Write the item table and the items' popularity.

    The table is written twice by the same encoder: from everything known, for serving, and from
    what was known before the test sessions, for training and evaluating HierTCN.

    Args:
        lineage: lineage of the encoder, and so of graph and snapshot.
        item_table_dtype: float16 or float32.
        filter_columns: item columns that requests may filter by; none takes all usable ones.
        graph_half_life_days: age in days at which an interaction counts half in the popularity.
        seed: seed of the walks, as in training.
        snapshot: the ingested log, for the popularity.
        item_index: id <-> row.
        sessions: the session store, for where the test sessions start.
        graph: the item graph.
        training_graph: the item graph without the days of the test sessions.
        features: the items' encoded features.
        item_encoder: the trained encoder.
        item_table: the table, one vector a row, the last coordinate a popularity prior.
        training_table: the same without what happened since the test sessions started.
        item_layers: what goes into each of the encoder's layers for each item, from which items
            that come between builds are embedded; in the table's dtype.
        popularity: ``popularity.npy``, decayed interaction counts, float32 [items].
        item_attributes: the items' columns that requests may filter by, and their titles.

    Returns:
        The lineage of both tables.
    """
    from components.step import step

    with step("embed_items", locals()) as running:
        import tempfile
        from pathlib import Path
        from typing import cast

        import duckdb
        import numpy as np
        from numpy.typing import NDArray

        from hiertcn.files import whole_directory
        from hiertcn.graph.csr import CSR
        from hiertcn.graph.walks import importance_neighborhoods
        from hiertcn.items.attributes import ItemAttributes
        from hiertcn.items.features import FeatureMatrix
        from hiertcn.items.index import IdIndex
        from hiertcn.items.prior import popularity_prior
        from hiertcn.items.table import ItemTable, TableDtype
        from hiertcn.sessions.split import split_by_time
        from hiertcn.sessions.store import SessionStore
        from hiertcn.training.item_inference import embed_items as embed
        from models.graphsage import load_graphsage

        encoder = load_graphsage(Path(item_encoder.path))
        matrix = FeatureMatrix.open(Path(features.path))
        index = IdIndex.open(Path(item_index.path))

        def count(before_us: int) -> NDArray[np.float32]:
            # An interaction counts half for each half-life between it and the newest one.
            decay = "1.0"
            if graph_half_life_days:
                age = "(max(epoch_us(timestamp)) over () - epoch_us(timestamp)) / 86400e6"
                decay = f"pow(0.5, {age} / {graph_half_life_days})"
            counted = duckdb.sql(
                f"select item_id, sum(weight) as count from (select item_id, {decay} as weight "
                f"from read_parquet('{snapshot.path}/events/**/*.parquet') "
                f"where epoch_us(timestamp) < {before_us}) group by item_id"
            ).to_arrow_table()
            counts = np.zeros(len(index), np.float32)
            counts[index.rows(counted["item_id"])] = counted["count"]
            return counts

        def write_table(
            graph: Path,
            counts: NDArray[np.float32],
            output: Path,
            layer_inputs: NDArray[np.float32] | None = None,
        ) -> ItemTable:
            vectors = embed(
                encoder,
                matrix if matrix.names else None,
                importance_neighborhoods(CSR.open(graph), seed=seed),
                layer_inputs=layer_inputs,
            )
            return ItemTable.write(
                output,
                np.column_stack([vectors, popularity_prior(counts)]),
                cast(TableDtype, item_table_dtype),
            )

        split = split_by_time(SessionStore.open(Path(sessions.path)))
        write_table(
            Path(training_graph.path), count(split.test_start_us), Path(training_table.path)
        )
        counts = count(np.iinfo(np.int64).max)
        with whole_directory(Path(popularity.path)) as folder:
            np.save(folder / "popularity.npy", counts)
        beside = Path(item_layers.path).parent
        beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=beside) as scratch:
            # On disk, because it may be several times as large as the table.
            layers = np.lib.format.open_memmap(
                Path(scratch) / "layers.npy",
                "w+",
                np.float32,
                (len(index), encoder.layers * encoder.config.hidden),
            )
            table = write_table(Path(graph.path), counts, Path(item_table.path), layers)
            ItemTable.write(Path(item_layers.path), layers, cast(TableDtype, item_table_dtype))
        ItemAttributes.write(
            Path(item_attributes.path),
            index,
            Path(snapshot.path) / "items.parquet",
            columns=filter_columns,
        )
        item_table.metadata.update(items=len(table), dim=table.dim)
    return running.lineage
