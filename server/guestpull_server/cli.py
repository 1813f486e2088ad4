"""The commands of `guestpulld`.

Each command is a thin shell: it reads options, calls the core, and prints. What is heavy to load (gRPC, the
rooms) is loaded by the command that needs it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from collections.abc import Iterable
from importlib.resources import files
from typing import Annotated, NoReturn

import msgspec
import typer

from guestpull_server.config import (
    A_YEAR,
    DEFAULT_WORK_DIR,
    MIN_DESCRIPTORS,
    Configuration,
    LayerNames,
    load_configuration,
)
from guestpull_server.errors import GuestpullError, TooFewDescriptors
from guestpull_server.service.addresses import Address, parse_address
from guestpull_server.service.log import LogFormat, LogLevel, configure
from guestpull_server.version import __version__

app = typer.Typer(
    name="guestpulld",
    help="Turns image references into mounted OCI bundles, and keeps their layers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _not_empty(path: str | None) -> str | None:
    """Refuse the path that a variable of a shell has which is not set: it would be the current directory."""
    if path == "":
        raise typer.BadParameter("it is empty")
    return path


WorkDir = Annotated[
    str | None,
    typer.Option(
        "--work-dir",
        metavar="DIR",
        help="The work directory: layers and meta_store.json. "
        f"[default: the configuration's; {DEFAULT_WORK_DIR}]",
        callback=_not_empty,
    ),
]
ConfigFile = Annotated[
    str | None, typer.Option("--config", metavar="FILE", help="The configuration [default: DIR/config.json].")
]

DEFAULT_ADDRESS = "unix:///run/guestpull/guestpull.sock"


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"guestpulld {__version__}")
        raise typer.Exit


@app.callback()
def _guestpulld(
    _version_asked: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version, and end.")
    ] = False,
) -> None:
    # before gRPC is loaded, which aborts the process where it may open too few files
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed < MIN_DESCRIPTORS:
        raise TooFewDescriptors(allowed, MIN_DESCRIPTORS)


def _address(text: str) -> Address:
    try:
        return parse_address(text)
    except ValueError as error:
        raise typer.BadParameter(f"--listen {text}: {error}") from None


@app.command()
def serve(
    work_dir: WorkDir = None,
    listen: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS", help=f"unix:///PATH or HOST:PORT; may be repeated [{DEFAULT_ADDRESS}]."
        ),
    ] = None,
    config: ConfigFile = None,
    grace: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, max=A_YEAR, help="What calls get to finish after SIGTERM."),
    ] = 10.0,
    tls_certificate: Annotated[
        str | None, typer.Option(metavar="FILE", help="PEM chain of this server, for TCP.")
    ] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", help="PEM key of that certificate.")] = None,
    tls_client_authorities: Annotated[
        str | None, typer.Option(metavar="FILE", help="PEM certificates that clients' must come from.")
    ] = None,
    insecure_tcp: Annotated[
        bool,
        typer.Option(
            "--insecure-tcp",
            help="Serve loopback TCP without TLS: every user of this machine can call, and so be root.",
        ),
    ] = False,
    log_format: Annotated[LogFormat, typer.Option(help="How log lines are written.")] = LogFormat.TEXT,
    log_level: Annotated[
        LogLevel, typer.Option(help="From which level on events are logged.")
    ] = LogLevel.WARNING,
) -> None:
    """Serve the gRPC API until SIGTERM."""
    # gRPC writes lines of its own between ours, as many as whoever connects by no TLS likes
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from guestpull_server.service.server import ServiceOptions, TlsFiles, serve

    configure(log_format, log_level)
    tls = None
    if tls_certificate or tls_key or tls_client_authorities:
        if not (tls_certificate and tls_key and tls_client_authorities):
            raise typer.BadParameter(
                "TLS needs all of --tls-certificate, --tls-key, --tls-client-authorities"
            )
        tls = TlsFiles(tls_certificate, tls_key, tls_client_authorities)
    addresses = [_address(text) for text in listen or [DEFAULT_ADDRESS]]
    configuration, warnings = _configuration(config, work_dir)
    serve(configuration, ServiceOptions(addresses, grace, tls, insecure_tcp), warnings)


def _absolute(path: str | None) -> str | None:
    """Refuse a path that means something here only: entries of layers that have it could not be used."""
    if path is not None and not path.startswith("/"):
        raise typer.BadParameter(f"{path!r} is not absolute: say where the guest will see it")
    return path


GuestWorkDir = Annotated[
    str | None,
    typer.Option(
        "--guest-work-dir",
        metavar="DIR",
        help="Where the guest will see the work directory.",
        callback=_absolute,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, for machines.")]


@app.command()
def bake(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="References, oci:PATH[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:REF].",
        ),
    ] = None,
    work_dir: WorkDir = None,
    guest_work_dir: GuestWorkDir = None,
    file: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="More sources: a line each, with a reference behind it or not."),
    ] = None,
    reference: Annotated[
        str, typer.Option(metavar="NAME", help="What the one image will be asked for by.")
    ] = "",
    remove: Annotated[
        list[str] | None, typer.Option(metavar="IMAGE", help="Take an image out first; may be repeated.")
    ] = None,
    platform: Annotated[
        str, typer.Option(metavar="OS/ARCH[/VARIANT]", help="Of another machine than this one.")
    ] = "",
    layer_names: Annotated[
        LayerNames | None,
        typer.Option(
            help="By digest; or by index, as today's image-rs needs in its own work directory. "
            "[default: as those that are there; digest]"
        ),
    ] = None,
    auth: Annotated[
        str, typer.Option(metavar="USER:PASSWORD", envvar="GUESTPULL_AUTH", help="For the registry.")
    ] = "",
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Put images into a work directory ahead of time, with no daemon: layers and meta_store.json."""
    from guestpull_server.upkeep.baking import bake_images, read_list

    wanted = [(source, reference) for source in sources or ()] + (read_list(file) if file else [])
    if not wanted and not remove:
        raise typer.BadParameter("name at least one SOURCE, or --file, or --remove")
    if reference and len(wanted) != 1:
        raise typer.BadParameter("--reference names one image; a LIST may name each of its own")
    configuration, warnings = _configuration(config, work_dir)
    _warn(warnings)
    baked = bake_images(
        configuration,
        wanted,
        removed=remove or (),
        guest_work_dir=guest_work_dir,
        platform=platform,
        layer_names=layer_names,
        auth=auth,
        warn=_warn,
    )
    _print(baked.lines(), baked, as_json)


@app.command()
def verify(
    work_dir: WorkDir = None,
    guest_work_dir: GuestWorkDir = None,
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Put each layer's tar together again; its digest must be the image's."),
    ] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Download exactly the layers that need it, and put entries right."),
    ] = False,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Say what is missing, incomplete, changed or foreign in a work directory; status 1 if anything is."""
    from guestpull_server.upkeep.verification import verify_work_dir

    configuration, warnings = _configuration(config, work_dir)
    _warn(warnings)
    found = verify_work_dir(
        configuration, guest_work_dir=guest_work_dir, deep=deep, repairs=repair, warn=_warn
    )
    _print(found.lines(), found, as_json)
    if not found.is_sound:
        raise typer.Exit(1)


@app.command("systemd-unit")
def systemd_unit() -> None:
    """Print a systemd unit that runs `guestpulld serve`."""
    unit = files("guestpull_server.service").joinpath("guestpulld.service").read_text()
    _print(unit.replace("@guestpulld@", _systemd_path(_program())).splitlines(), unit, as_json=False)


def _program() -> str:
    """Where this program lies, for others to start it."""
    found = shutil.which(sys.argv[0])
    return os.path.abspath(found or sys.argv[0])


def _systemd_path(path: str) -> str:
    """A path as systemd.service(5) reads it in a command line."""
    escaped = path.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if any(letter in path for letter in " \t'\"\\;") else escaped


@app.command()
def gc(
    work_dir: WorkDir = None,
    guest_work_dir: GuestWorkDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Delete what no image and no bundle refers to; refuses beside a running daemon."""
    from guestpull_server.upkeep.collection import collect

    configuration, warnings = _configuration(config, work_dir)
    _warn(warnings)
    collected = collect(configuration, guest_work_dir=guest_work_dir, dry_run=dry_run, warn=_warn)
    _print(collected.lines(), collected, as_json)


def _print(lines: Iterable[str], document: object, as_json: bool) -> None:
    try:
        if as_json:
            # the standard library's: a file's name need not be UTF-8, and comes back out of its escapes
            typer.echo(json.dumps(msgspec.to_builtins(document, enc_hook=str), indent=2))
            return
        for line in lines:
            typer.echo(_one_line(line))
    except BrokenPipeError:
        raise
    except OSError as error:
        typer.echo(f"guestpulld: what was done cannot be printed: {error.strerror}.", err=True)
        raise typer.Exit(1) from None


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        typer.echo(f"guestpulld: {_one_line(warning)}", err=True)


def _one_line(text: str) -> str:
    r"""Text of whatever origin as a terminal may see it: what it would obey is written as \x1b, \n and so on."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def _configuration(config: str | None, work_dir: str | None) -> tuple[Configuration, list[str]]:
    absolute = os.path.abspath(work_dir) if work_dir is not None else None
    return load_configuration(config, absolute)


def _open_standard_streams() -> None:
    """Have all three; else a file of the store gets a number that libraries write their complaints to."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(opened, True)
    os.close(opened)


def main() -> NoReturn:
    """Run the command line; errors are one line on standard error, and exit status 1."""
    os.umask(0o022)  # what is made has the modes that this program says, whoever starts it
    _open_standard_streams()
    status: str | int | None = 1
    try:
        app()
    except SystemExit as ended:
        status = ended.code
    except GuestpullError as error:
        typer.echo(f"guestpulld: {_one_line(error.explain())}", err=True)
    except OSError as error:  # standard output has no room
        typer.echo(f"guestpulld: {_one_line(str(error))}", err=True)
    sys.exit(status if _flush_output() else status or 1)


def _flush_output() -> bool:
    """Write out what standard output still holds, or discard it: at exit Python would try again, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


if __name__ == "__main__":
    main()
