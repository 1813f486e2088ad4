"""The commands of `guestpulld`.

Each command reads its options, calls the core, and prints the result. Packages that take long to load (gRPC, the
core) are imported by the command that needs them.
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
    help="Pull images into mounted OCI bundles, and manage the work directory that stores their layers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _not_empty(path: str | None) -> str | None:
    """Refuse an empty path, as from an unset shell variable: it would mean the current directory."""
    if path == "":
        raise typer.BadParameter("the path is empty")
    return path


WorkDir = Annotated[
    str | None,
    typer.Option(
        "--work-dir",
        metavar="DIR",
        help="The work directory, which holds layers and meta_store.json. "
        f"[default: work_dir of the configuration, else {DEFAULT_WORK_DIR}]",
        callback=_not_empty,
    ),
]
ConfigFile = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE", help="The configuration file. [default: DIR/config.json]"),
]

DEFAULT_ADDRESS = "unix:///run/guestpull/guestpull.sock"


def _version(show: bool) -> None:
    if show:
        typer.echo(f"guestpulld {__version__}")
        raise typer.Exit


@app.callback()
def _guestpulld(
    _show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    # check before gRPC is loaded: with too few descriptors, gRPC aborts the process
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
            metavar="ADDRESS",
            help=f"Listen at unix:///PATH or HOST:PORT; may be repeated. [default: {DEFAULT_ADDRESS}]",
        ),
    ] = None,
    config: ConfigFile = None,
    grace: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, max=A_YEAR, help="How long calls may run after SIGTERM."),
    ] = 10.0,
    tls_certificate: Annotated[
        str | None, typer.Option(metavar="FILE", help="PEM certificate chain of the server, for TCP.")
    ] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", help="PEM key of that certificate.")] = None,
    tls_client_authorities: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="PEM certificates of the authorities that sign client certificates."
        ),
    ] = None,
    insecure_tcp: Annotated[
        bool,
        typer.Option(
            "--insecure-tcp",
            help="Serve loopback TCP without TLS. Every user of this machine can then become root.",
        ),
    ] = False,
    log_format: Annotated[LogFormat, typer.Option(help="The format of log lines.")] = LogFormat.TEXT,
    log_level: Annotated[LogLevel, typer.Option(help="The lowest level to log.")] = LogLevel.WARNING,
) -> None:
    """Serve the gRPC API until SIGTERM."""
    # silence gRPC: it logs a line for each client that connects without TLS, so clients could flood the log
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from guestpull_server.service.server import ServiceOptions, TlsFiles, serve

    configure(log_format, log_level)
    tls = None
    if tls_certificate or tls_key or tls_client_authorities:
        if not (tls_certificate and tls_key and tls_client_authorities):
            raise typer.BadParameter(
                "TLS needs all of --tls-certificate, --tls-key and --tls-client-authorities"
            )
        tls = TlsFiles(tls_certificate, tls_key, tls_client_authorities)
    addresses = [_address(text) for text in listen or [DEFAULT_ADDRESS]]
    configuration, warnings = _configuration(config, work_dir)
    serve(configuration, ServiceOptions(addresses, grace, tls, insecure_tcp), warnings)


def _absolute(path: str | None) -> str | None:
    """Refuse a relative path: the guest could not use layer entries that contain it."""
    if path is not None and not path.startswith("/"):
        raise typer.BadParameter(f"{path!r} is not absolute: give the path in the guest")
    return path


GuestWorkDir = Annotated[
    str | None,
    typer.Option(
        "--guest-work-dir",
        metavar="DIR",
        help="The path of the work directory in the guest.",
        callback=_absolute,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command()
def bake(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="A reference, oci:PATH[:TAG], oci-archive:FILE[:TAG] or docker-archive:FILE[:REF].",
        ),
    ] = None,
    work_dir: WorkDir = None,
    guest_work_dir: GuestWorkDir = None,
    file: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="A file with more sources, one a line, each with an optional reference after it.",
        ),
    ] = None,
    reference: Annotated[
        str, typer.Option(metavar="NAME", help="Store the image under this reference. Only with one SOURCE.")
    ] = "",
    remove: Annotated[
        list[str] | None, typer.Option(metavar="IMAGE", help="Remove this image first; may be repeated.")
    ] = None,
    platform: Annotated[
        str, typer.Option(metavar="OS/ARCH[/VARIANT]", help="The platform to bake for. [default: the host's]")
    ] = "",
    layer_names: Annotated[
        LayerNames | None,
        typer.Option(
            help="How to name layers' directories: by digest, or by index as image-rs needs. "
            "[default: as in the work directory, else digest]"
        ),
    ] = None,
    auth: Annotated[
        str, typer.Option(metavar="USER:PASSWORD", envvar="GUESTPULL_AUTH", help="Registry credentials.")
    ] = "",
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Bring images into a work directory ahead of time, without a daemon."""
    from guestpull_server.upkeep.baking import bake_images, read_list

    wanted = [(source, reference) for source in sources or ()] + (read_list(file) if file else [])
    if not wanted and not remove:
        raise typer.BadParameter("give at least one SOURCE, --file or --remove")
    if reference and len(wanted) != 1:
        raise typer.BadParameter(
            "--reference needs exactly one SOURCE; in a LIST, write each reference after its source"
        )
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
        typer.Option(
            "--deep",
            help="Rebuild each layer's tar, and compare its digest with the one in the image's config.",
        ),
    ] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Download damaged layers again, and correct their entries."),
    ] = False,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Report what is missing, incomplete, changed or foreign in a work directory; if anything is, exit with 1."""
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
    """Return the absolute path of this program."""
    found = shutil.which(sys.argv[0])
    return os.path.abspath(found or sys.argv[0])


def _systemd_path(path: str) -> str:
    """Quote a path for a command line of systemd.service(5)."""
    escaped = path.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if any(letter in path for letter in " \t'\"\\;") else escaped


@app.command()
def gc(
    work_dir: WorkDir = None,
    guest_work_dir: GuestWorkDir = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be deleted, and delete nothing.")
    ] = False,
    config: ConfigFile = None,
    as_json: Json = False,
) -> None:
    """Delete everything that no image and no bundle refers to. Fails while a daemon serves the work directory."""
    from guestpull_server.upkeep.collection import collect

    configuration, warnings = _configuration(config, work_dir)
    _warn(warnings)
    collected = collect(configuration, guest_work_dir=guest_work_dir, dry_run=dry_run, warn=_warn)
    _print(collected.lines(), collected, as_json)


def _print(lines: Iterable[str], document: object, as_json: bool) -> None:
    try:
        if as_json:
            # not msgspec: json escapes file names that are not UTF-8, so that readers can restore them
            typer.echo(json.dumps(msgspec.to_builtins(document, enc_hook=str), indent=2))
            return
        for line in lines:
            typer.echo(_one_line(line))
    except BrokenPipeError:
        raise
    except OSError as error:
        typer.echo(f"guestpulld: Cannot print the result: {error.strerror}.", err=True)
        raise typer.Exit(1) from None


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        typer.echo(f"guestpulld: {_one_line(warning)}", err=True)


def _one_line(text: str) -> str:
    r"""Escape control characters (as \x1b, \n and so on), so that text cannot control a terminal."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def _configuration(config: str | None, work_dir: str | None) -> tuple[Configuration, list[str]]:
    absolute = os.path.abspath(work_dir) if work_dir is not None else None
    return load_configuration(config, absolute)


def _open_standard_streams() -> None:
    """Open standard streams that are closed: else a file of the store gets number 2, and libraries write to it."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(opened, True)
    os.close(opened)


def main() -> NoReturn:
    """Run the command line. Print an error as one line on standard error, and exit with status 1."""
    os.umask(0o022)  # the modes of new files must not depend on the caller
    _open_standard_streams()
    status: str | int | None = 1
    try:
        app()
    except SystemExit as exited:
        status = exited.code
    except GuestpullError as error:
        typer.echo(f"guestpulld: {_one_line(error.explain())}", err=True)
    except OSError as error:  # standard output is full or broken
        typer.echo(f"guestpulld: {_one_line(str(error))}", err=True)
    sys.exit(status if _flush_output() else status or 1)


def _flush_output() -> bool:
    """Flush standard output. If that fails, discard the rest: Python would fail on it again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


if __name__ == "__main__":
    main()
