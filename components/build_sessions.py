"""Step 2: cut each user's interactions into sessions."""

from kfp.dsl import Artifact, Dataset, Input, Output


def build_sessions(
    lineage: str,
    session_gap_s: float,
    snapshot: Input[Dataset],
    item_index: Input[Artifact],
    sessions: Output[Dataset],
) -> str:
    """Write the columnar session store.

    Args:
        lineage: lineage of the snapshot.
        session_gap_s: a longer pause, in seconds, ends a session.
        snapshot: the ingested log.
        item_index: id <-> row.
        sessions: the session store, memory-mapped columns of item rows and times.

    Returns:
        The lineage of the sessions.
    """
    from components.step import step

    with step("build_sessions", locals()) as running:
        from pathlib import Path

        from hiertcn.items.index import IdIndex
        from hiertcn.sessions.cut import build_sessions as cut_sessions

        cut_sessions(
            Path(snapshot.path) / "events",
            IdIndex.open(Path(item_index.path)),
            Path(sessions.path),
            gap_s=session_gap_s,
        )
    return running.lineage
