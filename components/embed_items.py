"""Step 4: embed every item into the item table, and index it for nearest neighbors."""

from kfp.dsl import Artifact, Dataset, Input, Model, Output


def embed_items(
    lineage: str,
    item_table_dtype: str,
    graph_half_life_days: float,
    seed: int,
    snapshot: Input[Dataset],
    item_index: Input[Artifact],
    graph: Input[Artifact],
    features: Input[Artifact],
    item_encoder: Input[Model],
    item_table: Output[Artifact],
    neighbor_index: Output[Artifact],
    popularity: Output[Artifact],
) -> str:
    """Write the item table, its nearest-neighbor index and the items' popularity.

    Args:
        lineage: lineage of the encoder, and so of graph and snapshot.
        item_table_dtype: float16 or float32.
        graph_half_life_days: age in days at which an interaction counts half in the popularity.
        seed: seed of the walks, as in training, and of the nearest-neighbor index.
        snapshot: the ingested log, for the popularity.
        item_index: id <-> row.
        graph: the item graph.
        features: the items' encoded features.
        item_encoder: the trained encoder.
        item_table: the table, one vector a row, the last coordinate a popularity prior.
        neighbor_index: nearest neighbors by inner product over the table.
        popularity: ``popularity.npy``, decayed interaction counts, float32 [items].

    Returns:
        The lineage of the table.
    """
    from components.step import step

    with step("embed_items", locals()) as running:
        from pathlib import Path
        from typing import cast

        import duckdb
        import numpy as np

        from hiertcn.files import whole_directory
        from hiertcn.graph.csr import CSR
        from hiertcn.graph.walks import importance_neighborhoods
        from hiertcn.items.features import FeatureMatrix
        from hiertcn.items.index import IdIndex
        from hiertcn.items.neighbors import build_neighbor_index
        from hiertcn.items.prior import popularity_prior
        from hiertcn.items.table import ItemTable, TableDtype
        from hiertcn.training.item_inference import embed_items as embed
        from models.graphsage import load_graphsage

        encoder = load_graphsage(Path(item_encoder.path))
        matrix = FeatureMatrix.open(Path(features.path))
        csr = CSR.open(Path(graph.path))
        vectors = embed(
            encoder,
            matrix if matrix.names else None,
            importance_neighborhoods(csr, seed=seed),
        )

        # An interaction counts half for each half-life between it and the newest one.
        decay = "1.0"
        if graph_half_life_days:
            age = "(max(epoch_us(timestamp)) over () - epoch_us(timestamp)) / 86400e6"
            decay = f"pow(0.5, {age} / {graph_half_life_days})"
        counted = duckdb.sql(
            f"select item_id, sum(weight) as count from (select item_id, {decay} as weight from "
            f"read_parquet('{snapshot.path}/events/**/*.parquet')) group by item_id"
        ).to_arrow_table()
        counts = np.zeros(csr.items, np.float32)
        counts[IdIndex.open(Path(item_index.path)).rows(counted["item_id"])] = counted["count"]
        with whole_directory(Path(popularity.path)) as folder:
            np.save(folder / "popularity.npy", counts)

        table = ItemTable.write(
            Path(item_table.path),
            np.column_stack([vectors, popularity_prior(counts)]),
            cast(TableDtype, item_table_dtype),
        )
        built = build_neighbor_index(table, Path(neighbor_index.path), seed=seed)
        item_table.metadata.update(items=len(table), dim=table.dim, recall=built.recall)
    return running.lineage
