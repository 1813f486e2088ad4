"""The commands of `guestpull`: each makes one call to the service and prints the response.

Results go to standard output, progress and errors to standard error. The exit status is 1 after an error
(printed as one line), 2 after wrong usage, 130 after Ctrl-C, which cancels the call. Only the commands that
need gRPC and rich load them.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from guestpull_client.addresses import ADDRESS_VARIABLE, DEFAULT_ADDRESS, address_or_default, target_of
from guestpull_client.errors import FailedPrecondition, GuestpullError, InvalidArgument, NotFound
from guestpull_client.models import Image, PullPolicy
from guestpull_client.text import is_terminal, one_line, short, size

if TYPE_CHECKING:
    from guestpull_client.client import Client

app = typer.Typer(
    name="guestpull",
    help="Pull images into OCI bundles through guestpulld, and manage its store.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_COMPLETION_SECONDS = 2.0
_INTERRUPTED = 130
_MAX_AUTH_BYTES = 64 * 1024
_MIN_DESCRIPTORS = 16  # open files; a call has 12 open, and gRPC aborts the process where it gets none


class Policy(Enum):
    """When to contact the registry."""

    TAG = "tag"
    ALWAYS = "always"
    MISSING = "missing"
    NEVER = "never"

    @property
    def pull_policy(self) -> PullPolicy:
        """The corresponding policy of the service."""
        match self:
            case Policy.TAG:
                return PullPolicy.UNSPECIFIED
            case Policy.ALWAYS:
                return PullPolicy.ALWAYS
            case Policy.MISSING:
                return PullPolicy.IF_NOT_PRESENT
            case Policy.NEVER:
                return PullPolicy.NEVER


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach the service: the options before the command."""

    address: str
    timeout: float | None
    tls: tuple[str, str, str] | None

    @contextmanager
    def client(self) -> Iterator[Client]:
        """A client for one command."""
        from guestpull_client.client import Client, TlsFiles

        tls = TlsFiles(*self.tls) if self.tls else None
        try:
            with Client(self.address, self.timeout, tls) as client:
                yield client
        except KeyboardInterrupt:
            typer.echo("guestpull: interrupted; the call was cancelled.", err=True)
            raise typer.Exit(_INTERRUPTED) from None


def connection_of(context: typer.Context) -> Connection:
    """The connection that the application's callback stored."""
    connection = context.obj
    if not isinstance(connection, Connection):
        raise TypeError("the command was not called through the application's callback")
    return connection


def show_version(context: typer.Context, requested: bool) -> None:
    """Print the program's version and exit."""
    if requested:
        from importlib.metadata import version

        typer.echo(f"{context.command.name} {version('guestpull')}")
        raise typer.Exit


Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS", envvar=ADDRESS_VARIABLE, help=f"unix:///PATH or HOST:PORT [{DEFAULT_ADDRESS}]."
    ),
]
Version = Annotated[
    bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
]
Platform = Annotated[
    str, typer.Option(metavar="OS/ARCH[/VARIANT]", help="The image's platform [the host's].")
]
PolicyOption = Annotated[
    Policy,
    typer.Option(
        help="When to contact the registry: to resolve a tag, always, if the image is missing, never.",
        case_sensitive=False,
    ),
]
Auth = Annotated[
    str,
    typer.Option(
        metavar="USER:PASSWORD",
        envvar="GUESTPULL_AUTH",
        help="Registry credentials. Other users of this machine can see them; --auth-stdin is safer.",
    ),
]
AuthStdin = Annotated[bool, typer.Option("--auth-stdin", help="Read USER:PASSWORD from standard input.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def check_descriptors() -> None:
    """Refuse to begin with too few files that may be open, before gRPC aborts the process.

    Raises:
        FailedPrecondition: the limit is too low.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed < _MIN_DESCRIPTORS:
        raise FailedPrecondition(
            f"The limit of open files is {allowed}; at least {_MIN_DESCRIPTORS} are needed. "
            "Raise it: `ulimit -n 1024` in a shell, LimitNOFILE= in a systemd unit.",
            "TOO_FEW_DESCRIPTORS",
        )


def parse_address(address: str | None) -> str:
    """The address to call; an invalid one is a usage error."""
    try:
        target_of(address_or_default(address))
    except InvalidArgument as error:
        raise typer.BadParameter(error.message, param_hint="--address") from None
    return address_or_default(address)


def read_auth(auth: str, auth_stdin: bool) -> str:
    """The credentials of --auth, or one line of standard input with --auth-stdin."""
    if not auth_stdin:
        return auth
    # unbuffered: the rest of standard input may be meant for the container
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        line = stdin.readline(_MAX_AUTH_BYTES)
    return line.decode(errors="surrogateescape").rstrip("\r\n")


@app.callback()
def _guestpull(
    context: typer.Context,
    address: Address = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="Give up after this time.")
    ] = None,
    tls_authorities: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="PEM authorities that signed a remote service's certificate."),
    ] = None,
    tls_certificate: Annotated[
        str | None, typer.Option(metavar="FILE", help="PEM certificate to present to a remote service.")
    ] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", help="PEM key of that certificate.")] = None,
    _version: Version = False,
) -> None:
    check_descriptors()
    tls = None
    if tls_authorities or tls_certificate or tls_key:
        if not (tls_authorities and tls_certificate and tls_key):
            raise typer.BadParameter(
                "TLS needs all of --tls-authorities, --tls-certificate and --tls-key",
                param_hint="--tls-authorities",
            )
        tls = (tls_authorities, tls_certificate, tls_key)
    context.obj = Connection(parse_address(address), timeout, tls)


def _complete_image(context: typer.Context, incomplete: str) -> list[str]:
    return _complete(
        context,
        incomplete,
        lambda client: [name for image in client.images() for name in (*image.references, image.id)],
    )


def _complete_bundle(context: typer.Context, incomplete: str) -> list[str]:
    return _complete(context, incomplete, lambda client: [one.bundle_path for one in client.bundles()])


def _complete(
    context: typer.Context, incomplete: str, list_names: Callable[[Client], list[str]]
) -> list[str]:
    """The service's names with a prefix; none after an error or a timeout, so that the shell stays usable."""
    from guestpull_client.client import Client

    address = context.parent.params.get("address") if context.parent else None
    try:
        with Client(address, _COMPLETION_SECONDS) as client:
            return [name for name in list_names(client) if name.startswith(incomplete)]
    except GuestpullError:
        return []


ImageArgument = Annotated[
    str, typer.Argument(metavar="IMAGE", help="An image id or a reference.", autocompletion=_complete_image)
]


@app.command()
def pull(
    context: typer.Context,
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE",
            help="A reference, such as busybox or quay.io/org/img:1.0.",
            autocompletion=_complete_image,
        ),
    ],
    bundle: Annotated[
        str,
        typer.Option("--bundle", "-b", metavar="DIR", help="The bundle directory; created if missing."),
    ],
    platform: Platform = "",
    policy: PolicyOption = Policy.TAG,
    auth: Auth = "",
    auth_stdin: AuthStdin = False,
    as_json: Json = False,
) -> None:
    """Pull an image into a bundle: mount its rootfs and write config.json."""
    credentials = read_auth(auth, auth_stdin)
    when = policy.pull_policy
    with connection_of(context).client() as client:
        if is_terminal(sys.stderr):
            from guestpull_client.progress import follow

            pulled = follow(
                client.pull_with_progress(image, bundle, auth=credentials, policy=when, platform=platform)
            )
        else:
            pulled = client.pull(image, bundle, auth=credentials, policy=when, platform=platform)
    if as_json:
        _print_json(pulled)
        return
    fresh = sum(not layer.reused for layer in pulled.layers)
    typer.echo(f"{one_line(pulled.reference)} is mounted at {one_line(pulled.rootfs_path)}")
    typer.echo(
        f"image {short(pulled.image_id)}, {_count(len(pulled.layers), 'layer')}, {fresh} of them new, "
        f"{size(pulled.downloaded_bytes)} downloaded"
    )


@app.command()
def images(
    context: typer.Context,
    reference: Annotated[
        str,
        typer.Argument(
            metavar="REFERENCE", help="List only images with this reference.", autocompletion=_complete_image
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """List the images of the store."""
    with connection_of(context).client() as client:
        found = client.images(reference)
    if as_json:
        _print_json(found)
        return
    _print_table(
        ("REFERENCE", "IMAGE", "PLATFORM", "LAYERS", "SIZE", "BUNDLES"),
        [
            (
                name or "-",
                short(image.id),
                image.platform,
                str(len(image.layers)),
                size(image.size_bytes),
                str(len(image.bundles)),
            )
            for image in found
            for name in image.references or ("",)
        ],
    )


@app.command()
def layers(
    context: typer.Context,
    image: Annotated[
        str,
        typer.Option(
            "--image",
            metavar="IMAGE",
            help="List only the layers of this image.",
            autocompletion=_complete_image,
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """List the layers of the store."""
    with connection_of(context).client() as client:
        found = client.layers(image)
    if as_json:
        _print_json(found)
        return
    _print_table(
        ("LAYER", "DIFF_ID", "DECODER", "SIZE", "IMAGES", "BUNDLES", "STATE"),
        [
            (
                short(layer.compressed_digest),
                short(layer.uncompressed_digest),
                layer.decoder,
                size(layer.size_bytes),
                str(len(layer.images)),
                str(layer.bundles),
                ("read-only" if layer.read_only else "present") if layer.present else "missing",
            )
            for layer in found
        ],
    )


@app.command()
def bundles(context: typer.Context, as_json: Json = False) -> None:
    """List the bundles that were created and not released."""
    with connection_of(context).client() as client:
        found = client.bundles()
    if as_json:
        _print_json(found)
        return
    _print_table(
        ("BUNDLE", "REFERENCE", "IMAGE", "MOUNTED"),
        [
            (bundle.bundle_path, bundle.reference, short(bundle.image_id), "yes" if bundle.mounted else "no")
            for bundle in found
        ],
    )


@app.command()
def inspect(context: typer.Context, image: ImageArgument, as_json: Json = False) -> None:
    """Show an image, its layers, and the bundles that use it."""
    with connection_of(context).client() as client:
        image_layers = client.layers(image)
        found = _image_with_layers(image, {layer.compressed_digest for layer in image_layers}, client)
    if as_json:
        _print_json({"image": found, "layers": image_layers})
        return
    rows = [
        ("image", found.id),
        ("manifest", found.digest),
        ("platform", found.platform),
        ("size", f"{size(found.size_bytes)} unpacked"),
        *(("reference", name) for name in found.references),
        *(
            (
                "layer",
                f"{layer.compressed_digest}  {size(layer.size_bytes)}{'' if layer.present else ', missing'}",
            )
            for layer in image_layers
        ),
        *(("bundle", bundle) for bundle in found.bundles),
    ]
    if found.read_only_store:
        rows.append(("store", f"{found.read_only_store} (read-only)"))
    for name, value in rows:
        typer.echo(f"{name:<11}{one_line(value)}")


def _image_with_layers(image: str, layer_digests: set[str], client: Client) -> Image:
    """The image that a text names and that has these layers."""
    named = [one for one in client.images() if _names(image, one)]
    if not named:
        # a short spelling of a reference, which the service knows how to normalise
        named = list(client.images(image))
    for one in named:
        if set(one.layers) == layer_digests:
            return one
    raise NotFound(f"image {image} changed while it was inspected. Try again.", "IMAGE_NOT_PRESENT")


def _names(text: str, image: Image) -> bool:
    digest = text if text.startswith("sha256:") else f"sha256:{text}"
    return text in image.references or image.digest == digest or image.id.startswith(digest)


@app.command()
def rmi(
    context: typer.Context,
    image: ImageArgument,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            "-f",
            help="Remove it although bundles use it; the last of them takes its layers along.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove an image, and delete the layers that nothing else uses."""
    with connection_of(context).client() as client:
        removal = client.remove_image(image, force=force)
    if as_json:
        _print_json(removal)
        return
    for name in removal.references:
        typer.echo(f"forgot {one_line(name)}")
    for image_id in removal.image_ids:
        typer.echo(f"forgot image {image_id}")
    typer.echo(_deleted(removal.deleted_layers, removal.freed_bytes))


@app.command()
def release(
    context: typer.Context,
    bundle: Annotated[
        str,
        typer.Argument(metavar="BUNDLE", help="The bundle directory.", autocompletion=_complete_bundle),
    ],
    as_json: Json = False,
) -> None:
    """Unmount a bundle, and delete what was written to it."""
    with connection_of(context).client() as client:
        released = client.release_bundle(bundle)
    if as_json:
        _print_json(released)
        return
    typer.echo(f"released {one_line(bundle)}")
    if released.deleted_layers:
        typer.echo(_deleted(released.deleted_layers, released.freed_bytes))


@app.command()
def gc(
    context: typer.Context,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Report what would be deleted, and delete nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Delete the layers that no image, bundle or pull uses."""
    with connection_of(context).client() as client:
        collected = client.collect_garbage(dry_run=dry_run)
    if as_json:
        _print_json(collected)
        return
    if dry_run:
        for layer in collected.deleted_layers:
            typer.echo(f"would delete layer {layer}")
        typer.echo(
            f"would delete {_count(len(collected.deleted_layers), 'layer')}, {size(collected.freed_bytes)}"
        )
    else:
        typer.echo(_deleted(collected.deleted_layers, collected.freed_bytes))


def _deleted(deleted: tuple[str, ...], freed_bytes: int) -> str:
    return f"deleted {_count(len(deleted), 'layer')}, {size(freed_bytes)} freed"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _print_json(document: object) -> None:
    from guestpull_client.output import print_json

    print_json(document)


def _print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from guestpull_client.output import print_table

    print_table(columns, rows)


def run_app(application: typer.Typer, name: str) -> NoReturn:
    """Run a command line and exit: print an error as one line and exit with 1; exit with 130 after Ctrl-C."""
    status: str | int | None = 1
    try:
        application()
    except SystemExit as ended:
        status = ended.code
    except GuestpullError as error:
        typer.echo(f"{name}: {one_line(error.message)}", err=True)
    except OSError as error:  # standard output is full or closed
        typer.echo(f"{name}: {one_line(str(error))}", err=True)
    sys.exit(status if _flush_output() else status or 1)


def _flush_output() -> bool:
    """Flush standard output, or redirect it to /dev/null if that fails: Python flushes again at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def main() -> NoReturn:
    """Run `guestpull`."""
    run_app(app, "guestpull")


if __name__ == "__main__":
    main()
