"""Options of the commands that talk to a running sidecar."""

from pathlib import Path
from typing import Annotated

import typer

Address = Annotated[
    str,
    typer.Option(envvar="HIERTCN_ADDRESS", help="host:port of the sidecar's gRPC door."),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        envvar="HIERTCN_TLS_CA",
        help="PEM certificates of the authorities that may sign the sidecar's; turns TLS on.",
        show_default="plain text",
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        envvar="HIERTCN_TLS_CERT", help="PEM certificate of this client.", show_default=False
    ),
]
TlsKey = Annotated[
    Path | None, typer.Option(envvar="HIERTCN_TLS_KEY", help="Its PEM key.", show_default=False)
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        envvar="HIERTCN_TOKEN_FILE",
        help="File whose first line ends in the bearer token.",
        show_default="no token",
    ),
]
TimeoutS = Annotated[
    float, typer.Option("--timeout", help="Longest wait for an answer, in seconds.", min=0.01)
]
