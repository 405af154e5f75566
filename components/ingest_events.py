"""Step 1: read the log, keep what counts, and number the items."""

from typing import NamedTuple

from kfp.dsl import Artifact, Dataset, Output


def ingest_events(
    events: str,
    items: str,
    data_date: str,
    scheduled_time: str,
    repository: str,
    user_column: str,
    item_column: str,
    timestamp_column: str,
    event_type_column: str,
    impressions_column: str,
    timestamp_unit: str,
    event_types: list[str],
    item_filter: str,
    min_user_interactions: int,
    max_user_interactions: int,
    min_item_interactions: int,
    session_gap_s: float,
    snapshot: Output[Dataset],
    item_index: Output[Artifact],
) -> NamedTuple(  # type: ignore[valid-type]
    "Outputs", [("lineage", str), ("release_date", str), ("parent_release", int)]
):
    """Ingest the log and index its items on top of the serving release's index.

    Never cached: what lies behind a URL changes. Its outputs' lineage is their content's, so the
    steps after it are cached whenever nothing new was read and nothing new is serving.

    Args:
        events: event log, any fsspec URL.
        items: items file, or empty.
        data_date: read events up to this date or instant; empty reads all; on a schedule, a macro.
        scheduled_time: moment the run was scheduled for (RFC 3339), where the backend knows it.
        repository: release repository, for the serving release's item index.
        user_column: column of the user ids.
        item_column: column of the item ids.
        timestamp_column: column of the times.
        event_type_column: column of the event types.
        impressions_column: column listing the items shown.
        timestamp_unit: unit of integer times.
        event_types: event types that count; none keeps all.
        item_filter: condition on the items file.
        min_user_interactions: drop users with fewer.
        max_user_interactions: drop users with more.
        min_item_interactions: drop items with fewer.
        session_gap_s: seconds of pause that end a session, for the statistics.
        snapshot: the ingested folder (docs/data-formats.md).
        item_index: id <-> row, append-only from release to release.

    Returns:
        The lineage, the UTC date the release is numbered by, and the serving release (0 if none).
    """
    from components.step import keep_under, step

    with step("ingest_events", locals()) as running:
        import hashlib
        from datetime import UTC, datetime
        from pathlib import Path

        import duckdb

        from components.scheduled_time import resolve_data_date
        from hiertcn.events.ingest import IngestOptions, ingest
        from hiertcn.files import sha256
        from hiertcn.items.index import IdIndex
        from hiertcn.release.repository import ReleaseRepository

        until = resolve_data_date(data_date, scheduled_time)
        summary = ingest(
            events,
            Path(snapshot.path),
            items_url=items or None,
            options=IngestOptions(
                user_column=user_column,
                item_column=item_column,
                timestamp_column=timestamp_column,
                event_type_column=event_type_column,
                impressions_column=impressions_column,
                timestamp_unit=timestamp_unit,
                event_types=tuple(event_types),
                item_filter=item_filter,
                min_user_interactions=min_user_interactions,
                max_user_interactions=max_user_interactions,
                min_item_interactions=min_item_interactions,
                session_gap_s=session_gap_s,
                data_date=until,
            ),
        )
        snapshot.metadata.update(
            hash=summary.hash, users=summary.users, items=summary.items, events=summary.events
        )
        releases = ReleaseRepository(repository)
        parent = releases.current()
        ids = duckdb.sql(
            "select distinct item_id from "
            f"read_parquet('{snapshot.path}/events/**/*.parquet') order by item_id"
        ).to_arrow_table()
        IdIndex.build(
            ids["item_id"],
            Path(item_index.path),
            IdIndex.open(releases.path(parent) / "item_index") if parent else None,
        )
        index_hash = sha256(Path(item_index.path) / "header.json")
        lineage = hashlib.sha256(f"{summary.hash} {index_hash}".encode()).hexdigest()
        keep_under(lineage, snapshot)
        keep_under(lineage, item_index)
        watermark = datetime.fromtimestamp(summary.watermark_us / 1e6, tz=UTC)
        release_date = until or f"{watermark:%Y-%m-%d}"
        running.record(release_date=release_date, parent_release=parent)

    class Outputs(NamedTuple):
        lineage: str
        release_date: str
        parent_release: int

    return Outputs(lineage, release_date, parent or 0)
