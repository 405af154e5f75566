"""``hiertcn releases``: list, show, activate, roll back and prune, and how commands print."""

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from hiertcn.errors import InputError

if TYPE_CHECKING:
    from hiertcn.release.repository import ReleaseRepository

releases_app: Final = typer.Typer(
    help="List, show, activate, roll back and prune releases.", no_args_is_help=True
)

Repository = Annotated[
    Path,
    typer.Option(
        envvar="HIERTCN_REPOSITORY",
        help="Folder of the release repository, or its triton_repo.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@releases_app.command("list")
def list_releases(repository: Repository, as_json: AsJson = False) -> None:
    """List the complete releases of a repository, newest first."""
    found = list(reversed(_opened(repository).releases()))
    if as_json:
        print_json(
            [
                {
                    "release": info.number,
                    "current": info.is_current,
                    "previous": info.is_previous,
                    "created": _rfc3339(info.created_us),
                    "watermark": _rfc3339(info.watermark_us),
                    "parent": info.parent,
                    "bytes": info.bytes,
                    "metrics": dict(info.metrics),
                }
                for info in found
            ]
        )
        return
    print_table(
        str(_opened(repository).root),
        ["release", "", "created", "watermark", "parent", "MiB"],
        [
            [
                str(info.number),
                "current" if info.is_current else "previous" if info.is_previous else "",
                _rfc3339(info.created_us),
                _rfc3339(info.watermark_us),
                str(info.parent or ""),
                f"{info.bytes / (1 << 20):.1f}",
            ]
            for info in found
        ],
    )


@releases_app.command("show")
def show_release(
    release: Annotated[int, typer.Argument(help="Release number, YYYYMMDDNN.")],
    repository: Repository,
) -> None:
    """Print a release's manifest, files left out, as JSON."""
    manifest = _opened(repository).manifest(release)
    print_json(
        {
            "release": manifest.release,
            "created": _rfc3339(manifest.created_us),
            "watermark": _rfc3339(manifest.watermark_us),
            "parent": manifest.parent,
            "settings": dict(manifest.settings),
            "metrics": dict(manifest.metrics),
            "files": len(manifest.files),
            "bytes": manifest.total_bytes,
        }
    )


@releases_app.command("activate")
def activate_release(
    release: Annotated[int, typer.Argument(help="Release number, YYYYMMDDNN.")],
    repository: Repository,
) -> None:
    """Verify a release and point at it; running sidecars follow within seconds."""
    _opened(repository).activate(release)
    typer.echo(f"release {release} is current")


@releases_app.command("rollback")
def roll_back_release(repository: Repository) -> None:
    """Point back at the previous release; running sidecars follow within seconds."""
    typer.echo(f"release {_opened(repository).roll_back()} is current")


@releases_app.command("prune")
def prune_releases(
    repository: Repository,
    keep: Annotated[
        int, typer.Option(help="Newest releases to keep, besides the current and previous.", min=1)
    ] = 5,
) -> None:
    """Remove old releases."""
    removed = _opened(repository).prune(keep)
    typer.echo(f"removed {', '.join(map(str, removed)) or 'nothing'}")


def print_json(value: Any) -> None:
    """Print a value as one line of JSON."""
    typer.echo(json.dumps(value))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print rows of text under a title."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _opened(path: Path) -> "ReleaseRepository":
    from hiertcn.release.repository import ReleaseRepository

    repository = ReleaseRepository(path)
    if not repository.root.is_dir():
        raise InputError(
            f"--repository {repository.root} does not exist; expected a release repository"
        )
    return repository


def _rfc3339(timestamp_us: int) -> str:
    when = datetime.datetime.fromtimestamp(timestamp_us / 1e6, tz=datetime.UTC)
    return when.isoformat(timespec="seconds").replace("+00:00", "Z")
