"""Step 10: compute every user's state with the model that will serve."""

from kfp.dsl import Artifact, Dataset, Input, Output


def backfill_user_states(
    lineage: str,
    items_lineage: str,
    sessions: Input[Dataset],
    item_table: Input[Artifact],
    onnx: Input[Artifact],
    user_states: Output[Artifact],
) -> str:
    """Fold every user's closed sessions through the exported ``gru_step``, and count what serves.

    Args:
        lineage: lineage of the exported models, and so of the sessions.
        items_lineage: lineage of the item table.
        sessions: the session store.
        item_table: the item table that serves.
        onnx: the exported models, the start state and any scoring terms.
        user_states: the state snapshot that the sidecar starts from, with every user's recent
            history, the live counts of the last six hours and, for scoring terms, transitions.

    Returns:
        The lineage of the states.
    """
    from components.step import step

    with step("backfill_user_states", locals()) as running:
        import os
        from pathlib import Path

        import numpy as np

        from hiertcn.export.term_gate import TERMS_FILE
        from hiertcn.items.table import ItemTable
        from hiertcn.serving.records.backfill import backfill_states
        from hiertcn.sessions.store import SessionStore

        exported = Path(onnx.path)
        backfill_states(
            SessionStore.open(Path(sessions.path)),
            ItemTable.open(Path(item_table.path)),
            exported / "gru_step" / "model.onnx",
            np.load(exported / "start_state.npy", allow_pickle=False),
            Path(user_states.path),
            threads=os.cpu_count() or 1,
            with_transitions=(exported / TERMS_FILE).exists(),
        )
    return running.lineage
