"""Step 8: bring the newest item table to what HierTCN was trained with, and index it."""

from kfp.dsl import Artifact, Input, Model, Output


def tune_item_table(
    lineage: str,
    neighbor_vectors: str,
    seed: int,
    embedded_table: Input[Artifact],
    training_table: Input[Artifact],
    model: Input[Model],
    item_table: Output[Artifact],
    neighbor_index: Output[Artifact],
) -> str:
    """Write the item table that serves, and its nearest-neighbor index.

    HierTCN's item vectors are those of the table as of the start of the test sessions. If they were
    fine-tuned, what each of them learnt is added to the item's newest vector; items that training
    never saw keep theirs. If they were frozen, the newest table serves as it is.

    Args:
        lineage: lineage of the model, and so of both tables.
        neighbor_vectors: float16 or int8, how the nearest-neighbor index stores them.
        seed: seed of the nearest-neighbor index.
        embedded_table: the newest item table.
        training_table: the item table as of the start of the test sessions.
        model: the trained model, with its item table if that was fine-tuned.
        item_table: the table that serves.
        neighbor_index: nearest neighbors by inner product over it.

    Returns:
        The lineage of table and index.
    """
    from components.step import step

    with step("tune_item_table", locals()) as running:
        from pathlib import Path
        from typing import cast

        from hiertcn.items.neighbor_building import build_neighbor_index
        from hiertcn.items.reranking import VectorKind
        from hiertcn.items.table import ItemTable
        from hiertcn.items.tuned_table import pass_table_on, write_tuned_table

        newest = ItemTable.open(Path(embedded_table.path))
        trained = Path(model.path) / "item_table"
        if trained.exists():
            start = ItemTable.open(Path(training_table.path))
            table = write_tuned_table(newest, start, ItemTable.open(trained), Path(item_table.path))
        else:
            table = pass_table_on(newest, Path(item_table.path))
        built = build_neighbor_index(
            table,
            Path(neighbor_index.path),
            vectors=cast(VectorKind, neighbor_vectors),
            seed=seed,
        )
        item_table.metadata.update(items=len(table), dim=table.dim)
        neighbor_index.metadata.update(
            kind=built.kind,
            vectors=built.vectors,
            bytes=built.bytes,
            recall=built.recall,
            recall_at=built.recall_at,
            recall_lost_to_int8=built.quantization.lost if built.quantization else 0.0,
        )
    return running.lineage
