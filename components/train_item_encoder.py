"""Step 4: learn item embeddings on the graph."""

from kfp.dsl import Artifact, Dataset, Input, Model, Output


def train_item_encoder(
    lineage: str,
    feature_columns: list[str],
    item_dim: int,
    encoder_pooling: str,
    encoder_epochs: int,
    align_items: str,
    seed: int,
    checkpoint_store: str,
    repository: str,
    parent_release: int,
    snapshot: Input[Dataset],
    item_index: Input[Artifact],
    training_graph: Input[Artifact],
    features: Output[Artifact],
    item_encoder: Output[Model],
) -> str:
    """Train GraphSAGE from the serving release's weights, or from scratch if nothing serves.

    Args:
        lineage: lineage of the graph, and so of the snapshot.
        feature_columns: item columns used as features; none uses all usable ones.
        item_dim: coordinates of an embedding.
        encoder_pooling: importance, mean, max or graphsage.
        encoder_epochs: at most this many epochs.
        align_items: no, or procrustes: rotate the embeddings to lie closest to those that serve.
        seed: seed of walks, features, weights and batches.
        checkpoint_store: folder for the checkpoint of an unfinished training; empty for none.
        repository: release repository that holds the serving release.
        parent_release: serving release, 0 if none.
        snapshot: the ingested log, for the items file.
        item_index: id <-> row.
        training_graph: the item graph without the days of the test sessions.
        features: the items' features, encoded as the serving release's were if the options are
            the same.
        item_encoder: the encoder's configuration, weights and training curve.

    Returns:
        The lineage of the encoder.
    """
    from components.step import resumable_folder, step

    with step("train_item_encoder", locals()) as running:
        import json
        from dataclasses import asdict
        from pathlib import Path

        import torch

        from hiertcn.files import read_json
        from hiertcn.graph.csr import CSR
        from hiertcn.graph.walks import importance_neighborhoods
        from hiertcn.items.features import FeatureMatrix, FeatureOptions, encode_features
        from hiertcn.items.index import IdIndex
        from hiertcn.items.table import ItemTable
        from hiertcn.release.repository import ReleaseRepository
        from hiertcn.training.item_continuity import continue_table
        from hiertcn.training.item_encoder import train_item_encoder as train
        from hiertcn.training.item_encoder_options import ItemEncoderOptions
        from models.graphsage import GraphSAGE, GraphSAGEConfig

        parent = ReleaseRepository(repository).path(parent_release) if parent_release else None
        options = FeatureOptions(columns=tuple(feature_columns), seed=seed)
        previous = None
        if parent is not None:
            header = read_json(parent / "item_features" / "header.json")
            if header["columns"] and header["options"] == json.loads(json.dumps(asdict(options))):
                previous = FeatureMatrix.open(parent / "item_features")
        items = Path(snapshot.path) / "items.parquet"
        matrix = encode_features(
            items if items.exists() else None,
            IdIndex.open(Path(item_index.path)),
            Path(features.path),
            options,
            previous=previous,
        )
        csr = CSR.open(Path(training_graph.path))
        torch.manual_seed(seed)
        encoder = GraphSAGE(
            GraphSAGEConfig(
                items=csr.items,
                feature_dim=len(matrix.names),
                dim=item_dim,
                # Narrower layers would leave coordinates of a wide output without meaning.
                hidden=max(item_dim, 64),
                pooling=encoder_pooling,
            )
        )
        with resumable_folder(Path(item_encoder.path), checkpoint_store, running.lineage) as folder:
            given = matrix if matrix.names else None
            neighborhoods = importance_neighborhoods(csr, seed=seed)
            summary = train(
                encoder,
                given,
                neighborhoods,
                csr,
                folder,
                ItemEncoderOptions(epochs=encoder_epochs, seed=seed),
                parent / "item_encoder" if parent is not None else None,
            )
            if parent is not None:
                continue_table(
                    encoder,
                    given,
                    neighborhoods,
                    ItemTable.open(parent / "item_table"),
                    folder,
                    align=align_items == "procrustes",
                    seed=seed,
                )
        item_encoder.metadata.update(
            steps=summary.steps, best_epoch=summary.best_epoch, hit_rate=summary.hit_rate or 0.0
        )
    return running.lineage
