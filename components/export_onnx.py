"""Step 9: export the served models to ONNX and prove that they compute the same."""

from kfp.dsl import Artifact, Input, Model, Output


def export_onnx(
    lineage: str,
    model: Input[Model],
    item_encoder: Input[Model],
    onnx: Output[Artifact],
) -> str:
    """Export the served models; a difference from torch beyond tolerance is an error.

    Args:
        lineage: lineage of the model.
        model: the trained model.
        item_encoder: the trained item encoder, which embeds items between builds.
        onnx: ``tcn/model.onnx``, ``gru_step/model.onnx``, ``item_encoder/model.onnx``,
            ``start_state.npy``, ``parity.json``, and ``scoring_terms.safetensors`` of a model with
            scoring terms.

    Returns:
        The lineage of the exported models.
    """
    from components.step import step

    with step("export_onnx", locals()) as running:
        from pathlib import Path

        from hiertcn.export.serving_models import export_serving_models
        from models.graphsage import load_graphsage
        from models.hiertcn import load_hiertcn
        from models.hiertcn_serving import GruStep, TcnCone
        from models.item_encoder_serving import NewItemEncoder

        trained = load_hiertcn(Path(model.path))
        export_serving_models(
            TcnCone(trained).eval(),
            GruStep(trained).eval(),
            trained.start_state.detach().numpy(),
            Path(onnx.path),
            item_dim=trained.config.item_dim,
            terms=trained.terms,
            item_encoder=NewItemEncoder(load_graphsage(Path(item_encoder.path))).eval(),
        )
    return running.lineage
