"""The data date of a scheduled run, from the moment for which the run was scheduled.

Kubeflow expands ``[[ScheduledTime.LAYOUT]]`` in the parameters of a recurring run, LAYOUT being
Go's way to write a date (``2006-01-02T15:04:05``). Some v2 backends leave the macro as it is
(kubeflow/pipelines#12494) but resolve the placeholder ``{{$.pipeline_job_schedule_time_utc}}``;
others do the reverse. A scheduled run therefore passes both, and whichever arrived is used.

Not a component itself: ingest_events calls it.
"""

import re
from datetime import UTC, datetime
from typing import Final

MIDNIGHT: Final = "[[ScheduledTime.2006-01-02T00:00:00Z]]"
"""Events before the UTC midnight at or before the scheduled moment: whole days only."""
INSTANT: Final = "[[ScheduledTime.2006-01-02T15:04:05Z]]"
"""Events before the scheduled moment."""

_MACRO = re.compile(r"\[\[ScheduledTime(?:\.(?P<layout>[^\]]*))?\]\]")
_DEFAULT_LAYOUT = "20060102150405"
_COMPACT = re.compile(r"\d{14}")
_GO_TO_STRFTIME = {"2006": "%Y", "01": "%m", "02": "%d", "15": "%H", "04": "%M", "05": "%S"}


def resolve_data_date(data_date: str, scheduled_time: str) -> str:
    """Return the data date as a date, an RFC 3339 instant, or empty for all events.

    Args:
        data_date: what the run was given: any of those three, ``YYYYMMDDhhmmss``, or a macro that
            the backend did not expand.
        scheduled_time: the run's scheduled moment (RFC 3339), or whatever else arrived for it.

    Raises:
        InputError: a macro was not expanded and the scheduled moment is not known either.
    """
    from hiertcn.errors import InputError

    text = data_date.strip()
    macro = _MACRO.fullmatch(text)
    if macro:
        moment = _instant(scheduled_time)
        if moment is None:
            raise InputError(
                f"the data date is {text}, which this Kubeflow backend neither expanded nor gave a "
                f"scheduled time for (it gave {scheduled_time!r}); upgrade the backend, or submit "
                "the run with --data-date YYYY-MM-DD"
            )
        text = _render(macro["layout"] or _DEFAULT_LAYOUT, moment)
    if _COMPACT.fullmatch(text):
        text = datetime.strptime(text, "%Y%m%d%H%M%S").isoformat() + "Z"
    return text


def _instant(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return (moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment).astimezone(UTC)


def _render(layout: str, moment: datetime) -> str:
    tokens = "|".join(_GO_TO_STRFTIME)
    return re.sub(tokens, lambda match: moment.strftime(_GO_TO_STRFTIME[match[0]]), layout)
