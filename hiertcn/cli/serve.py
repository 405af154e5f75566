"""``hiertcn serve``: what can be told to a sidecar and to the Triton beside it."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from hiertcn.cli.releases import Repository


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
            help="Longest that a request waits for others to share a model call with while the "
            "one before is under way, in milliseconds; else an eighth of it.",
            min=0,
        ),
    ] = 16.0,
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
    from hiertcn.serving.processes.supervisor import serve as serve_forever

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # It reports every instruction set it tries as an error.
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
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
