"""Step 11: publish the release and make it serve."""

from kfp.dsl import HTML, Artifact, Input, Model


def publish_release(
    lineage: str,
    release_date: str,
    repository: str,
    sidecar: str,
    keep_releases: int,
    item_index: Input[Artifact],
    features: Input[Artifact],
    item_encoder: Input[Model],
    item_table: Input[Artifact],
    neighbor_index: Input[Artifact],
    item_layers: Input[Artifact],
    popularity: Input[Artifact],
    item_attributes: Input[Artifact],
    model: Input[Model],
    onnx: Input[Artifact],
    user_states: Input[Artifact],
    evaluation: Input[Artifact],
    report: Input[HTML],
) -> int:
    """Publish everything that must agree as one release, and activate it.

    Never cached: every run that gets here publishes.

    Args:
        lineage: lineage of the states, and so of the whole release.
        release_date: UTC date, or instant, that the release is numbered by.
        repository: release repository.
        sidecar: ``host:port`` of the sidecar that activates it; empty flips the pointer.
        keep_releases: newest releases to keep.
        item_index: id <-> row.
        features: the items' features, which the next release encodes alike.
        item_encoder: the item encoder, which the next release warm-starts from.
        item_table: the item table that serves.
        neighbor_index: its nearest-neighbor index.
        item_layers: what items between builds are embedded from, beside their features.
        popularity: decayed interaction counts of the items.
        item_attributes: what requests may filter by, and the items' titles.
        model: the trained model, which the next release warm-starts from.
        onnx: the exported models, the start state and any scoring terms.
        user_states: every user's state.
        evaluation: metrics and the gate's decision.
        report: the report.

    Returns:
        The release's number.
    """
    from components.step import step

    with step("publish_release", locals()) as running:
        import logging
        from pathlib import Path

        from hiertcn.export.tensors import GRU_STEP, ITEM_ENCODER, TCN
        from hiertcn.export.term_gate import TERMS_FILE
        from hiertcn.files import read_json
        from hiertcn.release.publish import ReleaseInput, publish
        from hiertcn.release.repository import ReleaseRepository

        log = logging.getLogger("components.publish_release")
        exported = Path(onnx.path)
        encoder = Path(item_encoder.path)
        releases = ReleaseRepository(repository)
        number = publish(
            releases,
            {
                "item_index": Path(item_index.path),
                "item_table": Path(item_table.path),
                "neighbor_index": Path(neighbor_index.path),
                "popularity.npy": Path(popularity.path) / "popularity.npy",
                "item_attributes": Path(item_attributes.path),
                "user_states": Path(user_states.path),
                "start_state.npy": exported / "start_state.npy",
                "parity.json": exported / "parity.json",
                "model": Path(model.path),
                "item_features": Path(features.path),
                "item_layers": Path(item_layers.path),
                **{
                    f"item_encoder/{name}": encoder / name
                    for name in ("config.json", "model.safetensors", "curve.json")
                },
                "report.html": Path(report.path),
                **({TERMS_FILE: terms} if (terms := exported / TERMS_FILE).exists() else {}),
            },
            {name: exported / name / "model.onnx" for name in (TCN, GRU_STEP, ITEM_ENCODER)},
            ReleaseInput(
                data_date=release_date,
                metrics={
                    "evaluation": read_json(Path(evaluation.path) / "evaluation.json"),
                    "gate": read_json(Path(evaluation.path) / "gate.json"),
                    "neighbor_index": read_json(Path(neighbor_index.path) / "header.json"),
                    "lineage": lineage,
                },
            ),
        )
        if sidecar:
            from hiertcn.serving.client import RecommenderClient

            with RecommenderClient(sidecar) as client:
                client.activate(number)
        else:
            releases.activate(number)
        log.info("release %d is active", number)
        for removed in releases.prune(keep_releases):
            log.info("removed release %d, beyond the newest %d", removed, keep_releases)
        running.record(release=number)
    return number
