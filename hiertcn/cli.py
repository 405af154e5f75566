"""The ``hiertcn`` command: serve a release, ask it, feed it, simulate a log, manage releases.

Every heavy import waits until its command runs, so ``--help`` and the client commands start in a
fraction of a second. An error ends with one sentence on stderr and the exit code of its kind: 2
for bad input, 3 for a part that cannot be reached.
"""

import logging
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from hiertcn import __version__
from hiertcn.cli_connection import Address, TimeoutS, TlsCa, TlsCert, TlsKey, TokenFile
from hiertcn.cli_items import items_app
from hiertcn.cli_releases import AsJson, Repository, print_json, print_table, releases_app
from hiertcn.errors import HiertcnError, InputError

app: Final = typer.Typer(
    help="Session-aware, real-time recommendations: from an event log to live endpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
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
def serve(
    repository: Repository,
    triton_url: Annotated[
        str | None,
        typer.Option(
            help="host:port of a running Triton's gRPC door, in explicit model-control mode and "
            "on the repository's triton_repo.",
            show_default="start one",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="gRPC port; 0 takes any free one.")] = 50051,
    metrics_port: Annotated[
        int, typer.Option(help="Prometheus port; 0 takes any free one, -1 serves no metrics.")
    ] = 9464,
    triton_grpc_port: Annotated[
        int, typer.Option(help="gRPC port of the Triton that is started; 0 takes any free one.")
    ] = 8001,
    triton_http_port: Annotated[
        int, typer.Option(help="HTTP port of the Triton that is started; 0 takes any free one.")
    ] = 8000,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the event log, user records, recorded events and serving.json; one "
            "sidecar each.",
            show_default="<repository>/serving",
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(help="Processes that answer on the port; one of them writes.", min=1),
    ] = 1,
    models: Annotated[
        str,
        typer.Option(
            help="Where the models run: triton, or in-process (in the sidecar, without a Triton).",
        ),
    ] = "triton",
    item_memory: Annotated[
        str,
        typer.Option(
            help="How the item table is held: mapped, prefault (read in before it serves) or "
            "huge-pages (copied into huge pages where the kernel grants them).",
        ),
    ] = "mapped",
    model_deadline_ms: Annotated[
        float,
        typer.Option(
            help="Longest wait for the models, in milliseconds, before a simpler ranking answers.",
            min=1,
        ),
    ] = 200.0,
    batch_delay_ms: Annotated[
        float,
        typer.Option(
            help="Longest that a request waits for others to share a model call with, in "
            "milliseconds.",
            min=0,
        ),
    ] = 2.0,
    max_in_flight: Annotated[
        int,
        typer.Option(
            help="Requests in flight at which the next is refused (RESOURCE_EXHAUSTED).", min=1
        ),
    ] = 256,
    journal_entries: Annotated[
        int, typer.Option(help="Most interactions kept in one user's record.", min=1)
    ] = 4096,
    fsync: Annotated[
        str,
        typer.Option(
            help="When recorded interactions are forced to disk: always (before they are "
            "acknowledged), interval (0.1 s after at latest), os (when Linux writes back). Only a "
            "crash of the machine tells them apart."
        ),
    ] = "always",
    store: Annotated[
        str,
        typer.Option(
            envvar="HIERTCN_STORE",
            help="valkey://host:port[,host:port]/db shared by several sidecars (extra: valkey).",
            show_default="LMDB in --state-dir",
        ),
    ] = "",
    state_dtype: Annotated[
        str, typer.Option(help="Of the stored user states: float32, or float16 at half the size.")
    ] = "float32",
    user_ttl_days: Annotated[
        float,
        typer.Option(help="Forget users who did nothing for so long; 0 never does.", min=0),
    ] = 0.0,
    store_limit_mib: Annotated[
        int,
        typer.Option(help="Forget the longest idle users beyond this size; 0 is no limit.", min=0),
    ] = 0,
    max_new_items: Annotated[
        int,
        typer.Option(
            help="Most items from 'hiertcn items upsert' that no release knows yet.", min=1
        ),
    ] = 100_000,
    tls_cert: Annotated[
        Path | None,
        typer.Option(help="PEM certificate; serves TLS.", show_default="plain text"),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="Its PEM key, without a password.", show_default=False)
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            help="PEM certificates of the authorities that clients' certificates must come from "
            "(mutual TLS).",
            show_default="clients need none",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="Bearer tokens, lines 'scope[,scope] token' with scopes read, write and admin; "
            "read again when it changes.",
            show_default="no token needed",
        ),
    ] = None,
    rate_limit: Annotated[
        float,
        typer.Option(
            help="Requests a second of each token, client certificate or address; 0 is no limit.",
            min=0,
        ),
    ] = 0.0,
    max_message_bytes: Annotated[
        int, typer.Option(help="Largest request and reply, in bytes.", min=1024)
    ] = 16 << 20,
    ui: Annotated[
        bool, typer.Option("--ui", help="Serve the web page (extra: ui) on --ui-port.")
    ] = False,
    ui_port: Annotated[
        int, typer.Option(help="HTTP port of the web page; 0 takes any free one.")
    ] = 8080,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            help="http://host:port of an OpenTelemetry collector's gRPC door (extra: tracing).",
            show_default="no traces",
        ),
    ] = None,
    trace_sampling: Annotated[
        float,
        typer.Option(
            help="Share of the requests without a caller's trace that are traced.", min=0, max=1
        ),
    ] = 0.01,
) -> None:
    """Start Triton and the sidecar, and serve until SIGTERM or Ctrl-C."""
    from hiertcn.release.repository import ReleaseRepository
    from hiertcn.serving.options import ServeOptions, SidecarOptions
    from hiertcn.serving.supervisor import serve as serve_forever

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    root = ReleaseRepository(repository).root
    serve_forever(
        ServeOptions(
            sidecar=SidecarOptions(
                repository=root,
                triton_url=triton_url or "",
                state_dir=(state_dir or root / "serving").absolute(),
                host=host,
                port=port,
                metrics_port=None if metrics_port == -1 else metrics_port,
                workers=workers,
                models=models,
                item_memory=item_memory,
                model_deadline_s=model_deadline_ms / 1000,
                batch_delay_s=batch_delay_ms / 1000,
                max_in_flight=max_in_flight,
                journal_entries=journal_entries,
                fsync=fsync,
                store=store,
                state_dtype=state_dtype,
                user_ttl_s=user_ttl_days * 86_400,
                store_limit_bytes=store_limit_mib << 20,
                max_new_items=max_new_items,
                tls_cert=tls_cert,
                tls_key=tls_key,
                tls_client_ca=tls_client_ca,
                token_file=token_file,
                rate_limit=rate_limit,
                max_message_bytes=max_message_bytes,
                ui_port=ui_port if ui else None,
                otlp_endpoint=otlp_endpoint,
                trace_sampling=trace_sampling,
            ),
            triton_url=triton_url,
            triton_grpc_port=triton_grpc_port,
            triton_http_port=triton_http_port,
        )
    )


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
    from hiertcn.cli_filters import read_filters
    from hiertcn.serving.access import Access
    from hiertcn.serving.client import RecommenderClient

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
    from hiertcn.serving.access import Access
    from hiertcn.serving.client import Interaction, RecommenderClient
    from hiertcn.serving.interactions_file import read_interactions

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
    from hiertcn.serving.interactions_file import time_us

    return time_us(text, field)


if __name__ == "__main__":
    main()
