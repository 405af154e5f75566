"""The ``hiertcn`` command: serve a release, ask it, feed it, simulate a log, manage releases.

Every heavy import waits until its command runs, so ``--help`` and the client commands start in a
fraction of a second. An error ends with one sentence on stderr and the exit code of its kind: 2
for bad input, 3 for a part that cannot be reached.
"""

import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from hiertcn import __version__
from hiertcn.cli.connection import Address, TimeoutS, TlsCa, TlsCert, TlsKey, TokenFile
from hiertcn.cli.items import items_app
from hiertcn.cli.releases import AsJson, print_json, print_table, releases_app
from hiertcn.cli.serve import serve
from hiertcn.errors import HiertcnError, InputError

app: Final = typer.Typer(
    help="Session-aware, real-time recommendations: from an event log to live endpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.add_typer(releases_app, name="releases")
app.add_typer(items_app, name="items")


def main() -> None:
    """Run the command; the entry point of the installed script."""
    try:
        app()
    except HiertcnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def recommend(
    user: Annotated[str, typer.Argument(help="User id.")],
    k: Annotated[int, typer.Option("-k", "--k", help="Items to return, 1 to 1000.")] = 10,
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="Rank this item id; repeat it.", show_default="the whole catalogue"),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Never return this item id; repeat it.")
    ] = None,
    exclude_seen: Annotated[
        bool, typer.Option("--exclude-seen", help="Leave out what the user has interacted with.")
    ] = False,
    filter_: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            help="Condition on an item's attribute: column=value, column!=value, column>=value or "
            "column<=value; repeat it. Several values of one column are alternatives.",
        ),
    ] = None,
    deadline_ms: Annotated[
        int | None,
        typer.Option(
            help="Milliseconds after which a simpler ranking answers instead of the model.", min=1
        ),
    ] = None,
    timestamp: Annotated[
        str | None,
        typer.Option(
            help="Time of the request: microseconds since 1970-01-01 UTC, or RFC 3339.",
            show_default="now",
        ),
    ] = None,
    address: Address = "127.0.0.1:50051",
    timeout_s: TimeoutS = 5.0,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Ask a running sidecar for recommendations."""
    from hiertcn.cli.filters import read_filters
    from hiertcn.serving.client import RecommenderClient
    from hiertcn.serving.security.access import Access

    timestamp_us = _time_us(timestamp, "--timestamp") if timestamp is not None else None
    access = Access(tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, token_file=token_file)
    with RecommenderClient(address, timeout_s=timeout_s, access=access) as client:
        found = client.recommend(
            user,
            k=k,
            candidates=candidate or None,
            exclude=exclude or (),
            exclude_seen=exclude_seen,
            filters=read_filters(filter_ or ()),
            deadline_ms=deadline_ms,
            timestamp_us=timestamp_us,
        )
    if as_json:
        print_json(
            {
                "user_id": user,
                "release": found.release,
                "fallback": found.fallback,
                "items": [item._asdict() for item in found.items],
                "unknown_items": found.unknown_items,
            }
        )
        return
    print_table(
        f"{user}: release {found.release}{', fallback ranking' if found.fallback else ''}",
        ["rank", "item", "score"],
        [
            [str(rank), item.item_id, f"{item.score:.4f}"]
            for rank, item in enumerate(found.items, start=1)
        ],
    )
    if found.unknown_items:
        typer.echo(f"unknown to the release: {', '.join(found.unknown_items)}")


@app.command()
def record(
    file: Annotated[
        str | None,
        typer.Argument(
            help="JSON lines to record, - for stdin: user_id, item_id, and optionally timestamp "
            "(or timestamp_us), event_type, idempotency_key.",
            show_default=False,
        ),
    ] = None,
    user: Annotated[str | None, typer.Option(help="User id of one interaction.")] = None,
    item: Annotated[str | None, typer.Option(help="Item id of one interaction.")] = None,
    timestamp: Annotated[
        str | None,
        typer.Option(
            help="Its time: microseconds since 1970-01-01 UTC, or RFC 3339.", show_default="now"
        ),
    ] = None,
    event_type: Annotated[str, typer.Option(help="Its type.", show_default="none")] = "",
    address: Address = "127.0.0.1:50051",
    timeout_s: TimeoutS = 5.0,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Record interactions; when it returns they are on the sidecar's disk."""
    from hiertcn.serving.client import Interaction, RecommenderClient
    from hiertcn.serving.client.interactions_file import read_interactions
    from hiertcn.serving.security.access import Access

    if (file is None) == (user is None and item is None):
        raise InputError("give either FILE or --user and --item; expected exactly one of the two")
    if file is None and (user is None or item is None):
        raise InputError("--user and --item belong together; one of them is missing")
    accepted = duplicates = late = 0
    unknown: dict[str, None] = {}
    access = Access(tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, token_file=token_file)
    with RecommenderClient(address, timeout_s=timeout_s, access=access) as client:
        if file is not None:
            batches = read_interactions(file)
        else:
            time_us = _time_us(timestamp, "--timestamp") if timestamp is not None else None
            batches = iter([[Interaction(user or "", item or "", time_us, event_type=event_type)]])
        for batch in batches:
            result = client.record(batch)
            accepted += result.accepted
            duplicates += result.duplicates
            late += result.late
            unknown.update(dict.fromkeys(result.unknown_items))
    if as_json:
        print_json(
            {
                "accepted": accepted,
                "duplicates": duplicates,
                "late": late,
                "unknown_items": list(unknown),
            }
        )
        return
    typer.echo(
        f"accepted {accepted}, duplicates {duplicates}, of the accepted late {late}, "
        f"unknown items {len(unknown)}"
    )


@app.command()
def simulate(
    output: Annotated[Path, typer.Argument(help="Folder to write; replaced if it exists.")],
    users: Annotated[int, typer.Option(help="Users.")] = 20_000,
    items: Annotated[int, typer.Option(help="Items.")] = 2_000,
    days: Annotated[int, typer.Option(help="Length of the log, in days.")] = 30,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal logs.")] = 0,
    start_date: Annotated[str, typer.Option(help="First day, YYYY-MM-DD in UTC.")] = "2026-01-01",
    topics: Annotated[int, typer.Option(help="Latent topics, at most the items.")] = 24,
) -> None:
    """Write a simulated event log with the statistics of the HierTCN paper's Table 1."""
    from hiertcn.events.simulate import SimulationOptions
    from hiertcn.events.simulate import simulate as write_log

    summary = write_log(
        output,
        SimulationOptions(
            users=users, items=items, days=days, seed=seed, start_date=start_date, topics=topics
        ),
    )
    typer.echo(
        f"wrote {summary.events} events of {summary.users} users and {summary.items} items "
        f"to {output}"
    )


def _time_us(text: str, field: str) -> int:
    from hiertcn.serving.client.interactions_file import time_us

    return time_us(text, field)
