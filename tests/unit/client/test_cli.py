"""The command line `guestpull`: what it asks, what it prints, how it ends."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from guestpull_protos import image_service_pb2 as pb
from support.command_lines import CommandLine, into_closed_pipe, into_full_disk, with_few_descriptors
from support.scripted_service import ScriptedService, refusal
from support.waiting import PATIENCE

ID = "sha256:" + "1a" * 32
OTHER_ID = "sha256:" + "2b" * 32
MANIFEST = "sha256:" + "3c" * 32
LAYER = "sha256:" + "4d" * 32
DIFF_ID = "sha256:" + "5e" * 32
SHOP = "registry.example.com/shop:1.0"

PULLED = pb.PullImageResponse(
    image_id=ID,
    manifest_digest=MANIFEST,
    reference=SHOP,
    rootfs_path="/b/rootfs",
    downloaded_bytes=1_250_000,
    layers=[pb.PulledLayer(compressed_digest=LAYER, uncompressed_digest=DIFF_ID, downloaded_bytes=1_250_000)],
)
IMAGE = pb.Image(
    id=ID,
    digest=MANIFEST,
    reference=SHOP,
    references=[SHOP, "registry.example.com/shop:latest"],
    layers=[LAYER],
    size_bytes=3_000,
    platform="linux/amd64",
    bundles=["/b"],
)
STORED_LAYER = pb.Layer(
    compressed_digest=LAYER,
    uncompressed_digest=DIFF_ID,
    decoder="Gzip",
    store_path=f"/w/layers/{LAYER.replace(':', '_')}",
    size_bytes=3_000,
    images=[ID],
    bundles=1,
    present=True,
)


def subprocess_of(arguments: list[str], address: str) -> list[str]:
    return [sys.executable, "-m", "guestpull_client.cli", "--address", address, *arguments]


# -- pull ----------------------------------------------------------------------------------------------------


def test_a_pull_prints_the_reference_and_the_rootfs(service: ScriptedService, guestpull: CommandLine) -> None:
    service.answers["PullImage"] = PULLED

    outcome = guestpull("pull", "shop", "--bundle", "/b")

    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.splitlines() == [
        f"{SHOP} is mounted at /b/rootfs",
        f"image {ID}, 1 layer, 1 of them new, 1.2 MB downloaded",
    ]


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ("tag", pb.PULL_POLICY_UNSPECIFIED),
        ("always", pb.PULL_POLICY_ALWAYS),
        ("missing", pb.PULL_POLICY_IF_NOT_PRESENT),
        ("never", pb.PULL_POLICY_NEVER),
    ],
)
def test_a_pull_sends_its_options(
    service: ScriptedService, guestpull: CommandLine, policy: str, wanted: pb.PullPolicy.ValueType
) -> None:
    guestpull(
        *(
            "pull",
            "shop",
            "-b",
            "/b",
            "--policy",
            policy,
            "--platform",
            "linux/arm64",
            "--auth",
            "user:secret",
        )
    )

    assert service.requests == [
        pb.PullImageRequest(
            image_url="shop",
            bundle_path="/b",
            auth_info="user:secret",
            pull_policy=wanted,
            platform="linux/arm64",
        )
    ]


def test_credentials_can_come_from_standard_input(service: ScriptedService, tmp_path: Path) -> None:
    command = subprocess_of(["pull", "shop", "-b", "/b", "--auth-stdin"], service.address)
    subprocess.run(command, input=b"user:secret\n", check=True, capture_output=True)

    assert isinstance(pull := service.requests[0], pb.PullImageRequest)
    assert pull.auth_info == "user:secret"


def test_a_pull_s_result_is_one_json_document_for_machines(
    service: ScriptedService, guestpull: CommandLine
) -> None:
    service.answers["PullImage"] = PULLED

    assert json.loads(guestpull("pull", "shop", "-b", "/b", "--json").out) == {
        "image_id": ID,
        "manifest_digest": MANIFEST,
        "reference": SHOP,
        "rootfs_path": "/b/rootfs",
        "downloaded_bytes": 1_250_000,
        "layers": [
            {
                "compressed_digest": LAYER,
                "uncompressed_digest": DIFF_ID,
                "reused": False,
                "downloaded_bytes": 1_250_000,
            }
        ],
    }


def test_a_terminal_sees_progress_and_a_file_gets_the_result(
    service: ScriptedService, tmp_path: Path
) -> None:
    service.answers["PullImageWithProgress"] = [
        pb.PullImageEvent(
            resolved=pb.Resolved(layers=[pb.ResolvedLayer(compressed_digest=LAYER, size_bytes=1_250_000)])
        ),
        pb.PullImageEvent(
            layer_progress=pb.LayerProgress(compressed_digest=LAYER, done_bytes=7, total_bytes=1_250_000)
        ),
        pb.PullImageEvent(layer_done=pb.LayerDone(compressed_digest=LAYER, downloaded_bytes=1_250_000)),
        pb.PullImageEvent(mounted=pb.Mounted(rootfs_path="/b/rootfs")),
        pb.PullImageEvent(result=PULLED),
    ]
    shown, terminal = pty.openpty()
    with (tmp_path / "out").open("wb") as out:
        subprocess.run(
            subprocess_of(["pull", "shop", "-b", "/b", "--json"], service.address),
            stdout=out,
            stderr=terminal,
            check=True,
            env=os.environ | {"TERM": "xterm"},
        )
    os.close(terminal)
    progress = read_terminal(shown)

    assert b"4d4d4d4d4d4d" in progress
    assert b"done" in progress
    assert json.loads((tmp_path / "out").read_text())["image_id"] == ID


@pytest.mark.parametrize("width", [10, 40, 80, 200])
def test_a_table_is_complete_on_a_terminal_of_any_width(service: ScriptedService, width: int) -> None:
    path, reference = f"/bundles/{'q' * 70}", f"registry.example.com/{'z' * 90}:1.0"
    bundle = pb.Bundle(bundle_path=path, reference=reference, image_id=ID, mounted=True)
    service.answers["ListBundles"] = pb.ListBundlesResponse(bundles=[bundle])
    shown, terminal = pty.openpty()
    subprocess.run(
        subprocess_of(["bundles"], service.address),
        stdout=terminal,
        check=True,
        env=os.environ | {"TERM": "dumb", "COLUMNS": str(width)},
    )
    os.close(terminal)

    letters = read_terminal(shown).decode()
    assert "…" not in letters
    assert (letters.count("q"), letters.count("z")) == (70, 90)
    assert {"BUNDLE", "REFERENCE", "IMAGE", "MOUNTED", "1a1a1a1a1a1a", "yes"} <= set(letters.split())


def read_terminal(descriptor: int) -> bytes:
    """All that was written to a terminal whose programs have ended."""
    chunks: list[bytes] = []
    try:
        while chunk := os.read(descriptor, 65536):
            chunks.append(chunk)
    except OSError:  # EIO: nobody has the other end any more
        pass
    finally:
        os.close(descriptor)
    return b"".join(chunks)


def test_ctrl_c_cancels_the_pull_and_ends_with_one_line_and_130(service: ScriptedService) -> None:
    def interrupt(context: grpc.ServicerContext) -> pb.PullImageResponse:
        pulling.send_signal(signal.SIGINT)
        return service.wait_until_caller_leaves(context)

    service.answers["PullImage"] = interrupt
    # a suite that was started in the background ignores SIGINT, and hands that down
    as_in_the_foreground = ["env", "--default-signal=INT"]
    command = [*as_in_the_foreground, *subprocess_of(["pull", "shop", "-b", "/b"], service.address)]
    pulling = subprocess.Popen(command, stdout=-1, stderr=-1, text=True)

    out, err = pulling.communicate(timeout=PATIENCE)

    assert pulling.returncode == 130
    assert (out, err) == ("", "guestpull: interrupted; the call was cancelled.\n")
    assert service.caller_left.wait(PATIENCE)


# -- lists -----------------------------------------------------------------------------------------------------


def test_images_are_a_table_with_a_line_for_each_name(
    service: ScriptedService, guestpull: CommandLine
) -> None:
    service.answers["ListImages"] = pb.ListImagesResponse(images=[IMAGE])

    lines = guestpull("images").out.splitlines()

    assert lines[0].split() == ["REFERENCE", "IMAGE", "PLATFORM", "LAYERS", "SIZE", "BUNDLES"]
    assert lines[1].split() == [SHOP, ID, "linux/amd64", "1", "3.0", "kB", "1"]
    assert lines[2].split()[0] == "registry.example.com/shop:latest"


def test_an_image_without_a_name_has_its_line_too(service: ScriptedService, guestpull: CommandLine) -> None:
    service.answers["ListImages"] = pb.ListImagesResponse(images=[pb.Image(id=ID)])

    assert guestpull("images").out.splitlines()[1].split()[:2] == ["-", ID]


def test_layers_are_listed_with_their_state(service: ScriptedService, guestpull: CommandLine) -> None:
    missing = pb.Layer(compressed_digest=OTHER_ID, store_path="/w/layers/0")
    read_only = pb.Layer(compressed_digest=MANIFEST, store_path="/ro", present=True, read_only=True)
    service.answers["ListLayers"] = pb.ListLayersResponse(layers=[STORED_LAYER, missing, read_only])

    lines = guestpull("layers", "--image", "shop").out.splitlines()

    assert service.requests == [pb.ListLayersRequest(image="shop")]
    assert [line.split()[-1] for line in lines] == ["STATE", "present", "missing", "read-only"]
    assert LAYER in lines[1]


def test_bundles_say_whether_they_are_mounted(service: ScriptedService, guestpull: CommandLine) -> None:
    service.answers["ListBundles"] = pb.ListBundlesResponse(
        bundles=[
            pb.Bundle(bundle_path="/b", reference=SHOP, image_id=ID, mounted=True),
            pb.Bundle(bundle_path="/c", reference=SHOP, image_id=ID),
        ]
    )

    lines = guestpull("bundles").out.splitlines()

    assert [line.split()[0] for line in lines] == ["BUNDLE", "/b", "/c"]
    assert [line.split()[-1] for line in lines] == ["MOUNTED", "yes", "no"]


@pytest.mark.parametrize("command", ["images", "layers", "bundles"])
def test_empty_lists_are_a_heading_or_an_empty_json_list(guestpull: CommandLine, command: str) -> None:
    assert len(guestpull(command).out.splitlines()) == 1
    assert json.loads(guestpull(command, "--json").out) == []


@pytest.mark.parametrize("text", [ID, ID[7:19], MANIFEST, SHOP])
def test_inspect_shows_one_image_by_any_of_its_names(
    service: ScriptedService, guestpull: CommandLine, text: str
) -> None:
    service.answers["ListLayers"] = pb.ListLayersResponse(layers=[STORED_LAYER])
    service.answers["ListImages"] = pb.ListImagesResponse(images=[pb.Image(id=OTHER_ID), IMAGE])

    document = json.loads(guestpull("inspect", text, "--json").out)

    assert document["image"]["id"] == ID
    assert [layer["compressed_digest"] for layer in document["layers"]] == [LAYER]


def test_inspect_is_readable_by_people(service: ScriptedService, guestpull: CommandLine) -> None:
    service.answers["ListLayers"] = pb.ListLayersResponse(layers=[STORED_LAYER])
    service.answers["ListImages"] = pb.ListImagesResponse(images=[IMAGE])

    assert guestpull("inspect", ID).out.splitlines() == [
        f"image      {ID}",
        f"manifest   {MANIFEST}",
        "platform   linux/amd64",
        "size       3.0 kB unpacked",
        f"reference  {SHOP}",
        "reference  registry.example.com/shop:latest",
        f"layer      {LAYER}  3.0 kB",
        "bundle     /b",
    ]


# -- letting go --------------------------------------------------------------------------------------------------


def test_rmi_prints_what_was_removed_and_freed(service: ScriptedService, guestpull: CommandLine) -> None:
    service.answers["RemoveImage"] = pb.RemoveImageResponse(
        image_ids=[ID], references=[SHOP], deleted_layers=[LAYER, OTHER_ID], freed_bytes=2_000_000_000
    )

    outcome = guestpull("rmi", SHOP, "--force")

    assert service.requests == [pb.RemoveImageRequest(image=SHOP, force=True)]
    assert outcome.out.splitlines() == [
        f"forgot {SHOP}",
        f"forgot image {ID}",
        "deleted 2 layers, 2.0 GB freed",
    ]


def test_release_makes_the_path_absolute(
    service: ScriptedService, guestpull: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert guestpull("release", "one").out == "released one\n"
    assert service.requests == [pb.ReleaseBundleRequest(bundle_path=f"{tmp_path}/one")]


@pytest.mark.parametrize(
    ("options", "dry_run", "said"),
    [
        ((), False, ["deleted 1 layer, 2.0 kB freed"]),
        (("--dry-run",), True, [f"would delete layer {LAYER}", "would delete 1 layer, 2.0 kB"]),
    ],
)
def test_gc_prints_what_it_deleted_or_would_delete(
    service: ScriptedService, guestpull: CommandLine, options: tuple[str, ...], dry_run: bool, said: list[str]
) -> None:
    service.answers["CollectGarbage"] = pb.CollectGarbageResponse(deleted_layers=[LAYER], freed_bytes=2000)

    assert guestpull("gc", *options).out.splitlines() == said
    assert service.requests == [pb.CollectGarbageRequest(dry_run=dry_run)]


def test_gc_as_json_has_the_protos_names(service: ScriptedService, guestpull: CommandLine) -> None:
    service.answers["CollectGarbage"] = pb.CollectGarbageResponse(deleted_layers=[LAYER], freed_bytes=2000)

    assert json.loads(guestpull("gc", "--json").out) == {"deleted_layers": [LAYER], "freed_bytes": 2000}


# -- how it ends -------------------------------------------------------------------------------------------------


def test_an_error_is_one_line_and_status_1(service: ScriptedService, guestpull: CommandLine) -> None:
    service.answers["ListLayers"] = refusal("NOT_FOUND", "IMAGE_NOT_PRESENT", "no image shop. Pull it.")

    outcome = guestpull("layers", "--image", "shop")

    assert (outcome.status, outcome.out, outcome.err) == (1, "", "guestpull: no image shop. Pull it.\n")


def test_messages_of_a_registry_cannot_control_the_terminal(
    service: ScriptedService, guestpull: CommandLine
) -> None:
    service.answers["PullImage"] = refusal("UNAVAILABLE", "X", "it says \x1b[2J\nand more")

    assert guestpull("pull", "x", "-b", "/b").err == "guestpull: it says \\x1b[2J\\nand more\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("pull", "shop"),
        ("pull", "shop", "-b", "/b", "--policy", "sometimes"),
        ("nothing",),
        ("--address", "nowhere", "images"),
        ("--tls-key", "/key", "images"),
    ],
)
def test_wrong_usage_is_status_2(guestpull: CommandLine, arguments: tuple[str, ...]) -> None:
    assert guestpull(*arguments).status == 2


@pytest.mark.parametrize(
    ("module", "command"),
    [("guestpull_client.cli", "images"), ("guestpull_client.agent.cli", "run shop")],
)
def test_too_few_descriptors_are_refused_in_one_line_that_says_what_to_do(module: str, command: str) -> None:
    ended = with_few_descriptors(10, module, command.split())

    assert (ended.status, ended.out, ended.err.count("\n")) == (1, "", 1)
    assert "The limit of open files is 10; at least 16 are needed. Raise it: " in ended.err


def test_a_call_needs_no_more_descriptors_than_that(service: ScriptedService) -> None:
    ended = with_few_descriptors(16, "guestpull_client.cli", ["--address", service.address, "images"])

    assert (ended.status, ended.err) == (0, "")


BUFFERED = pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
PRINTING = pytest.mark.parametrize(
    ("module", "command"),
    [
        ("guestpull_client.cli", "--address {} images"),
        ("guestpull_client.cli", "--address {} images --json"),
        ("guestpull_client.cli", "--help"),
        ("guestpull_client.cli", "--version"),
        ("guestpull_client.agent.cli", "run --help"),
        ("guestpull_client.agent.cli", "--version"),
    ],
)


@BUFFERED
@PRINTING
def test_a_reader_that_stops_early_is_not_an_error(
    service: ScriptedService, module: str, command: str, buffered: bool
) -> None:
    service.answers["ListImages"] = pb.ListImagesResponse(images=[IMAGE] * 5_000)
    words = command.format(service.address).split()

    assert into_closed_pipe(module, words, buffered=buffered).err == ""


@BUFFERED
@PRINTING
def test_a_full_standard_output_is_an_error_in_one_line(
    service: ScriptedService, module: str, command: str, buffered: bool
) -> None:
    words = command.format(service.address).split()

    ended = into_full_disk(module, words, buffered=buffered)

    program = "guestpull-agent" if "agent" in module else "guestpull"
    assert (ended.status, ended.err) == (1, f"{program}: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("command", ["images", "pull shop -b /b"])
def test_closed_standard_streams_are_not_an_error(service: ScriptedService, command: str) -> None:
    service.answers["PullImage"] = PULLED
    service.answers["ListImages"] = pb.ListImagesResponse(images=[IMAGE])
    words = shlex.join(subprocess_of(command.split(), service.address))

    assert subprocess.run(["sh", "-c", f"{words} <&- >&- 2>&-"], check=False).returncode == 0


def test_the_version_is_that_of_the_distribution(guestpull: CommandLine) -> None:
    from importlib.metadata import version

    assert guestpull("--version").out == f"guestpull {version('guestpull')}\n"


def test_help_does_not_load_grpc() -> None:
    program = (
        "import sys, guestpull_client.cli, guestpull_client.agent.cli\n"
        "sys.exit('grpc' in sys.modules or 'rich' in sys.modules)"
    )

    subprocess.run([sys.executable, "-c", program], check=True)


# -- completion --------------------------------------------------------------------------------------------------


def complete(words: str, address: str) -> list[str]:
    asked = {"_GUESTPULL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    answer = subprocess.run(
        [sys.executable, "-c", "from guestpull_client.cli import app; app(prog_name='guestpull')"],
        env=os.environ | asked | {"GUESTPULL_ADDRESS": address},
        check=False,
        capture_output=True,
        text=True,
    )
    assert answer.stderr == ""
    return answer.stdout.split()


def test_the_shell_completes_images_of_the_store(service: ScriptedService) -> None:
    service.answers["ListImages"] = pb.ListImagesResponse(images=[IMAGE])

    assert complete("guestpull rmi registry.example.com/shop:l", service.address) == [
        "registry.example.com/shop:latest"
    ]


def test_the_shell_completes_bundles(service: ScriptedService) -> None:
    service.answers["ListBundles"] = pb.ListBundlesResponse(bundles=[pb.Bundle(bundle_path="/b")])

    assert complete("guestpull release /", service.address) == ["/b"]


def test_completion_is_empty_if_the_service_does_not_answer(tmp_path: Path) -> None:
    assert complete("guestpull rmi x", f"unix://{tmp_path}/none") == []
