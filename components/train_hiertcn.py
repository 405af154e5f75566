"""Step 6: train HierTCN on the sessions."""

from kfp.dsl import Artifact, Dataset, Input, Model, Output


def train_hiertcn(
    items_lineage: str,
    sessions_lineage: str,
    configuration: str,
    item_vectors: str,
    hidden: int,
    lanes: int,
    sessions_per_step: int,
    learning_rate: float,
    max_epochs: int,
    max_steps: int,
    patience: int,
    seed: int,
    checkpoint_store: str,
    repository: str,
    parent_release: int,
    sessions: Input[Dataset],
    training_table: Input[Artifact],
    model: Output[Model],
) -> str:
    """Train HierTCN from the serving release's weights, or from scratch if nothing serves.

    Args:
        items_lineage: lineage of the item tables.
        sessions_lineage: lineage of the sessions.
        configuration: best (with scoring terms, and a linear head) or paper.
        item_vectors: frozen, or fine-tuned from the item table's; auto leaves it to the
            configuration.
        hidden: coordinates of a GRU layer's state.
        lanes: users trained on side by side.
        sessions_per_step: sessions of each lane in one step.
        learning_rate: Adam's learning rate.
        max_epochs: at most this many epochs.
        max_steps: at most this many steps; 0 sets no limit.
        patience: epochs without a better validation MRR before training stops.
        seed: seed of weights, batches and negatives.
        checkpoint_store: folder for the checkpoint of an unfinished training; empty for none.
        repository: release repository that holds the serving release.
        parent_release: serving release, 0 if none.
        sessions: the session store.
        training_table: the item table as of the start of the test sessions.
        model: configuration, weights, training curve; the transitions that scoring terms read, and
            the item table of fine-tuned vectors.

    Returns:
        The lineage of the model.
    """
    from components.step import resumable_folder, step

    with step("train_hiertcn", locals()) as running:
        import logging
        from dataclasses import replace
        from pathlib import Path
        from typing import cast

        import torch

        from hiertcn.errors import InputError
        from hiertcn.files import read_json
        from hiertcn.items.table import ItemTable
        from hiertcn.release.repository import ReleaseRepository
        from hiertcn.sessions.request_features import FEATURES
        from hiertcn.sessions.split import split_by_time
        from hiertcn.sessions.store import SessionStore
        from hiertcn.training.hiertcn import train_hiertcn as train
        from hiertcn.training.options import ItemVectorKind, TrainOptions
        from models.hiertcn import HierTCN, HierTCNConfig

        table = ItemTable.open(Path(training_table.path))
        network = replace(HierTCNConfig.paper(table.dim), hidden=hidden)
        configurations = {
            "best": (replace(network, terms=FEATURES, head="linear"), "fine-tuned"),
            "paper": (network, "frozen"),
        }
        if configuration not in configurations:
            raise InputError(
                f"the configuration is {configuration!r}; expected {' or '.join(configurations)}"
            )
        config, vectors = configurations[configuration]
        if item_vectors not in ("auto", "frozen", "fine-tuned"):
            raise InputError(
                f"item_vectors is {item_vectors!r}; expected auto, frozen or fine-tuned"
            )
        if item_vectors != "auto":
            vectors = item_vectors
        warm_start = None
        if parent_release:
            warm_start = ReleaseRepository(repository).path(parent_release) / "model"
            parent = HierTCNConfig.from_dict(read_json(warm_start / "config.json"))
            if replace(parent, terms=config.terms) != config:
                logging.getLogger("components.train_hiertcn").warning(
                    "release %d has a network of another shape; training from scratch",
                    parent_release,
                )
                warm_start = None
        store = SessionStore.open(Path(sessions.path))
        torch.manual_seed(seed)
        with resumable_folder(Path(model.path), checkpoint_store, running.lineage) as folder:
            summary = train(
                HierTCN(config),
                store,
                table,
                split_by_time(store),
                folder,
                TrainOptions(
                    item_vectors=cast(ItemVectorKind, vectors),
                    lanes=lanes,
                    sessions_per_step=sessions_per_step,
                    learning_rate=learning_rate,
                    max_epochs=max_epochs,
                    max_steps=max_steps,
                    # A run that is cut short may not see the end of an epoch.
                    validate_steps=max_steps // 4,
                    patience=patience,
                    seed=seed,
                ),
                warm_start,
            )
        model.metadata.update(summary.to_dict())
    return running.lineage
