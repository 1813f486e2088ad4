"""The commands of `guestpull-agent`. The exit status is the container's."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, NoReturn

import typer

from guestpull_client.agent.container import CONTAINER_BASE, Container, RunOptions, run_container
from guestpull_client.agent.pause import PAUSE_BUNDLE
from guestpull_client.agent.request import check_container_id, container_of_request
from guestpull_client.cli import (
    Address,
    Auth,
    AuthStdin,
    Platform,
    Policy,
    PolicyOption,
    Version,
    check_descriptors,
    parse_address,
    read_auth,
    run_app,
)
from guestpull_client.errors import InvalidArgument
from guestpull_client.text import one_line

app = typer.Typer(
    name="guestpull-agent",
    help="Run containers from images that guestpulld pulls, as Kata's agent does in a guest.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RuntimeProgram = Annotated[
    str, typer.Option("--runtime", metavar="PROGRAM", help="The OCI runtime, runc or crun.")
]
BundleRoot = Annotated[str, typer.Option(metavar="DIR", help="Create the bundle in DIR/<ID>.")]
StopTimeout = Annotated[
    float,
    typer.Option(
        metavar="SECONDS", min=0, help="Time between SIGTERM and SIGKILL for the container to exit."
    ),
]
Keep = Annotated[
    bool, typer.Option("--keep", help="Keep the mounted bundle; `guestpull release` releases it.")
]
Time = Annotated[bool, typer.Option("--time", help="Print the time of each step to standard error.")]


@app.callback()
def _agent(context: typer.Context, address: Address = None, _version: Version = False) -> None:
    check_descriptors()
    context.obj = parse_address(address)


@app.command()
def run(
    context: typer.Context,
    image: Annotated[str, typer.Argument(help="A reference, such as busybox or quay.io/org/img:1.0.")],
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- COMMAND",
            help="Run this instead of the image's Entrypoint and Cmd.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[str, typer.Option(metavar="ID", help="The container's id [a random one].")] = "",
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            "-e",
            metavar="NAME[=VALUE]",
            help="Set a variable; without a value, copy it from the agent's environment.",
        ),
    ] = None,
    platform: Platform = "",
    policy: PolicyOption = Policy.TAG,
    auth: Auth = "",
    auth_stdin: AuthStdin = False,
    runtime: RuntimeProgram = "runc",
    bundle_root: BundleRoot = CONTAINER_BASE,
    stop_timeout: StopTimeout = 10.0,
    keep: Keep = False,
    time: Time = False,
) -> None:
    """Pull an image, run a container from it until it exits, and release the bundle."""
    container = Container(
        container_id=check_container_id(name or secrets.token_hex(16)),
        image=image,
        specification={"process": {"args": [*(command or [])], "env": [*_variables(env or [])]}},
    )
    options = RunOptions(
        auth=read_auth(auth, auth_stdin),
        policy=policy.pull_policy,
        platform=platform,
        runtime=runtime,
        bundle_root=bundle_root,
        stop_seconds=stop_timeout,
        keep=keep,
        report_time=_print_note if time else None,
    )
    _run(context, container, options)


@app.command()
def create(
    context: typer.Context,
    request: Annotated[
        str, typer.Option(metavar="FILE", help="A CreateContainerRequest in JSON; - for standard input.")
    ],
    platform: Platform = "",
    policy: PolicyOption = Policy.TAG,
    auth: Auth = "",
    runtime: RuntimeProgram = "runc",
    bundle_root: BundleRoot = CONTAINER_BASE,
    pause_bundle: Annotated[
        str, typer.Option(metavar="DIR", help="The bundle of the pause image, for a sandbox.")
    ] = PAUSE_BUNDLE,
    stop_timeout: StopTimeout = 10.0,
    keep: Keep = False,
    time: Time = False,
) -> None:
    """Run the container of a Kata CreateContainerRequest until it exits, and release the bundle."""
    container, warnings = container_of_request(_read(request))
    for warning in warnings:
        _print_note(f"warning: {warning}")
    options = RunOptions(
        auth=auth,
        policy=policy.pull_policy,
        platform=platform,
        runtime=runtime,
        bundle_root=bundle_root,
        pause_bundle=pause_bundle,
        stop_seconds=stop_timeout,
        keep=keep,
        report_time=_print_note if time else None,
    )
    _run(context, container, options)


def _run(context: typer.Context, container: Container, options: RunOptions) -> NoReturn:
    from guestpull_client.client import Client

    with Client(str(context.obj)) as client:
        raise typer.Exit(run_container(client, container, options))


def _variables(given: Iterable[str]) -> Iterator[str]:
    for variable in given:
        if "=" in variable:
            yield variable
        elif variable in os.environ:
            yield f"{variable}={os.environ[variable]}"


def _read(request: str) -> bytes:
    if request == "-":
        return sys.stdin.buffer.read()
    try:
        with open(request, "rb") as file:
            return file.read()
    except OSError as error:
        raise InvalidArgument(
            f"Cannot read {request}: {error.strerror}. Name a file with a CreateContainerRequest in JSON."
        ) from None


def _print_note(note: str) -> None:
    typer.echo(f"guestpull-agent: {one_line(note)}", err=True)


def main() -> NoReturn:
    """Run `guestpull-agent`."""
    run_app(app, "guestpull-agent")


if __name__ == "__main__":
    main()
