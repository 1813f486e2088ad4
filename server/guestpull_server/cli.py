"""The commands of `guestpulld`.

Each command is a thin shell: it reads options, calls the core, and prints. What is heavy to load (gRPC, the
rooms) is loaded by the command that needs it.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from guestpull_server import __version__
from guestpull_server.config import Configuration, load_configuration
from guestpull_server.errors import GuestpullError
from guestpull_server.service.log import LogFormat, LogLevel, configure

app = typer.Typer(
    name="guestpulld",
    help="Turns image references into mounted OCI bundles, and keeps their layers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

WorkDir = Annotated[
    str | None,
    typer.Option("--work-dir", metavar="DIR", help="The work directory: layers and meta_store.json."),
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
    pass


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
        float, typer.Option(metavar="SECONDS", min=0, help="What calls get to finish after SIGTERM.")
    ] = 10.0,
    tls_certificate: Annotated[
        str | None, typer.Option(metavar="FILE", help="PEM chain of this server, for TCP.")
    ] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", help="PEM key of that certificate.")] = None,
    tls_client_authorities: Annotated[
        str | None, typer.Option(metavar="FILE", help="PEM certificates that clients' must come from.")
    ] = None,
    log_format: Annotated[LogFormat, typer.Option(help="How log lines are written.")] = LogFormat.TEXT,
    log_level: Annotated[
        LogLevel, typer.Option(help="From which level on events are logged.")
    ] = LogLevel.WARNING,
) -> None:
    """Serve the gRPC API until SIGTERM."""
    from guestpull_server.service.server import ServiceOptions, TlsFiles, serve

    configure(log_format, log_level)
    tls = None
    if tls_certificate or tls_key or tls_client_authorities:
        if not (tls_certificate and tls_key and tls_client_authorities):
            raise typer.BadParameter(
                "TLS needs all of --tls-certificate, --tls-key, --tls-client-authorities"
            )
        tls = TlsFiles(tls_certificate, tls_key, tls_client_authorities)
    configuration, warnings = _configuration(config, work_dir)
    serve(configuration, ServiceOptions(listen or [DEFAULT_ADDRESS], grace, tls), warnings)


def _configuration(config: str | None, work_dir: str | None) -> tuple[Configuration, list[str]]:
    absolute = os.path.abspath(work_dir) if work_dir is not None else None
    return load_configuration(config, absolute)


def main() -> NoReturn:
    """Run the command line; errors are one line on standard error, and exit status 1."""
    try:
        app()
    except GuestpullError as error:
        typer.echo(f"guestpulld: {error.explain()}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
