"""``hiertcn items``: what is done about items between builds."""

from typing import Annotated, Final

import typer

from hiertcn.cli.connection import Address, TimeoutS, TlsCa, TlsCert, TlsKey, TokenFile
from hiertcn.cli.releases import AsJson, print_json
from hiertcn.errors import InputError

items_app: Final = typer.Typer(help="Add items between builds.", no_args_is_help=True)


@items_app.callback()
def _items() -> None:
    # With a callback Typer keeps "upsert" as a command of its own.
    pass


@items_app.command()
def upsert(
    file: Annotated[
        str | None,
        typer.Argument(
            help="Items file in parquet, or JSON lines, - for stdin: item_id, and optionally "
            "attributes (an object), neighbors, neighbor_weights.",
            show_default=False,
        ),
    ] = None,
    item: Annotated[str | None, typer.Option(help="Id of one item.")] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option(help="Its attribute as NAME=VALUE, text or JSON; repeat it."),
    ] = None,
    neighbor: Annotated[
        list[str] | None, typer.Option(help="Id of an item that it belongs to; repeat it.")
    ] = None,
    address: Address = "127.0.0.1:50051",
    timeout_s: TimeoutS = 60.0,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Add items that the release does not know; when it returns they are candidates."""
    from hiertcn.serving.client import NewItem, RecommenderClient
    from hiertcn.serving.client.items import attribute_of, read_items
    from hiertcn.serving.security.access import Access

    if (file is None) == (item is None):
        raise InputError("give either FILE or --item; expected exactly one of the two")
    if file is not None and (attribute or neighbor):
        raise InputError("--attribute and --neighbor belong to --item; FILE has its own")
    release = count = 0
    known: dict[str, None] = {}
    bare: dict[str, None] = {}
    unknown: dict[str, None] = {}
    access = Access(tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, token_file=token_file)
    with RecommenderClient(address, timeout_s=timeout_s, access=access) as client:
        if file is not None:
            batches = read_items(file)
        else:
            attributes = dict(map(attribute_of, attribute or ()))
            batches = iter([[NewItem(item or "", attributes, neighbor or ())]])
        for batch in batches:
            found = client.upsert_items(batch, timeout_s=timeout_s)
            release, count = found.release, count + len(batch)
            known.update(dict.fromkeys(found.known_items))
            bare.update(dict.fromkeys(found.without_features))
            unknown.update(dict.fromkeys(found.unknown_neighbors))
    if as_json:
        print_json(
            {
                "release": release,
                "items": count,
                "known_items": list(known),
                "without_features": list(bare),
                "unknown_neighbors": list(unknown),
            }
        )
        return
    typer.echo(
        f"release {release}: {count - len(known)} new items, {len(known)} it knew already; of the "
        f"new ones {len(bare)} without features; {len(unknown)} unknown neighbors"
    )
