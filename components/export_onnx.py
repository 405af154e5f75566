"""Step 9: export the served models to ONNX and prove that they compute the same."""

from kfp.dsl import Artifact, Dataset, Input, Model, Output


def export_onnx(
    lineage: str,
    items_lineage: str,
    serving_precision: str,
    seed: int,
    model: Input[Model],
    item_encoder: Input[Model],
    item_table: Input[Artifact],
    sessions: Input[Dataset],
    onnx: Output[Artifact],
) -> str:
    """Export the served models; a difference from torch beyond tolerance is an error.

    Args:
        lineage: lineage of the model, and so of the sessions.
        items_lineage: lineage of the item table.
        serving_precision: float32, or int8 for a quantized TCN where it ranks as float32 does.
        seed: of the users whose sessions int8 is calibrated and judged on.
        model: the trained model.
        item_encoder: the trained item encoder, which embeds items between builds.
        item_table: the item table that serves.
        sessions: the session store.
        onnx: ``tcn/model.onnx``, ``gru_step/model.onnx``, ``item_encoder/model.onnx``,
            ``start_state.npy``, ``parity.json``, and ``scoring_terms.safetensors`` of a model with
            scoring terms.

    Returns:
        The lineage of the exported models.
    """
    from components.step import step

    with step("export_onnx", locals()) as running:
        from pathlib import Path

        from hiertcn.export.open_sessions import draw_open_sessions
        from hiertcn.export.serving_models import export_serving_models
        from hiertcn.items.table import ItemTable
        from hiertcn.sessions.store import SessionStore
        from models.graphsage import load_graphsage
        from models.hiertcn import load_hiertcn
        from models.hiertcn_serving import GruStep, TcnCone
        from models.item_encoder_serving import NewItemEncoder

        trained = load_hiertcn(Path(model.path))
        gru_step, start_state = GruStep(trained).eval(), trained.start_state.detach().numpy()
        int8 = None
        if serving_precision == "int8":
            store = SessionStore.open(Path(sessions.path))
            table = ItemTable.open(Path(item_table.path))
            int8 = draw_open_sessions(store, table, gru_step, start_state, seed=seed), table
        export_serving_models(
            TcnCone(trained).eval(),
            gru_step,
            start_state,
            Path(onnx.path),
            item_dim=trained.config.item_dim,
            terms=trained.terms,
            item_encoder=NewItemEncoder(load_graphsage(Path(item_encoder.path))).eval(),
            int8=int8,
        )
    return running.lineage
