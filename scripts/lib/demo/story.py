"""Pulls an image, lists it, pulls a second one, runs it, reuses it in another work directory, removes all."""

from __future__ import annotations

import json
import socket
import sys
import time
import urllib.request
from pathlib import Path
from typing import Final

from demo.images import TAGS
from demo.stage import Stage, run

DIRECTORY: Final = Path("/run/guestpull-demo")
"""The directory of the demonstration; short, so that commands stay readable."""

_FOLLOW: Final = """\
python3 - <<'END'
from guestpull_client import Client, LayerDone, LayerProgress, Mounted
with Client() as client:
    for event in client.pull_with_progress("{image}", "{bundle}"):
        match event:
            case LayerProgress(digest, done, total):
                print(f"{{digest[7:19]}}  {{done / 1e6:5.1f}} of {{total / 1e6:.1f}} MB")
            case LayerDone(digest, reused):
                print(f"{{digest[7:19]}}  unpacked, and both of its digests are right")
            case Mounted(rootfs):
                print(f"mounted at {{rootfs}}")
END"""


def tell(stage: Stage, layout: Path) -> None:
    """Run the demonstration.

    Raises:
        DemoFailed: a step failed.
    """
    host = start_registry(stage, layout)
    _start_daemon(stage)
    cold = _pull_cold(stage, f"{host}/python:3.11")
    _ask(stage)
    _pull_what_is_new(stage, f"{host}/shop:1.0")
    _run(stage, f"{host}/shop:1.0")
    _reuse(stage, f"{host}/shop:1.0")
    _let_go(stage, (f"{host}/python:3.11", f"{host}/shop:1.0"))
    stage.chapter("That was it")
    stage.tell(
        f"A cold pull of {cold}; a second image that cost its own layer only; a container by runc; a second "
        "work directory that downloaded nothing with the registry gone; and nothing left. ./scripts/bench "
        "measures all of this beside podman and containerd; docs/architecture.md says how it works."
    )


def start_registry(stage: Stage, layout: Path) -> str:
    """Start docker-registry and push the images to it; returns its host and port."""
    stage.chapter("A registry, with three images in it")
    stage.tell(
        "Debian's docker-registry, on loopback. The images are Debian 12 (mmdebstrap), Python and some of its "
        "packages on top of it (apt), and on top of that a shop that sells numbers."
    )
    host = _free_address()
    (stage.directory / "registry.json").write_text(
        json.dumps(
            {
                "version": "0.1",
                "log": {"level": "error", "accesslog": {"disabled": True}},
                "storage": {"filesystem": {"rootdirectory": str(stage.directory / "registry")}},
                "http": {"addr": host},
            }
        )
    )
    stage.start("registry", "docker-registry serve registry.json", lambda: _answers(host))
    for tag, reference in zip(TAGS, ("debian:12", "python:3.11", "shop:1.0"), strict=True):
        source, target = f"oci:{layout}:{tag}", f"docker://{host}/{reference}"
        run("skopeo", "copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false", source, target)
    inspect = f"skopeo inspect --raw --tls-verify=false docker://{host}/shop:1.0"
    stage.show(f'{inspect} | grep --only-matching \'"digest":"[^"]*","size":[0-9]*\'')
    stage.tell("The shop's config, then its layers with the bytes of each: Debian, Python, the shop itself.")
    return host


def _start_daemon(stage: Stage) -> None:
    stage.chapter("The daemon")
    daemon = "guestpulld serve --work-dir work --listen unix://$PWD/guestpull.sock --log-level info"
    begun = time.monotonic()
    stage.start("guestpulld", daemon, lambda: listens(stage.directory / "guestpull.sock"))
    stage.tell(
        f"It serves after {time.monotonic() - begun:.2f} s. $GUESTPULL_ADDRESS tells the commands below where."
    )


def _pull_cold(stage: Stage, image: str) -> str:
    stage.chapter("A cold pull")
    begun = time.monotonic()
    if sys.stderr.isatty():
        stage.show(f"guestpull pull {image} --bundle bundles/python")
    else:
        # without a terminal there is no progress bar; use the client's events
        stage.show(_FOLLOW.format(image=image, bundle="bundles/python"))
    seconds = time.monotonic() - begun
    entries = int(run("sh", "-c", f"find {stage.directory}/bundles/python/rootfs | wc -l"))
    downloaded = sum(layer["size"] for layer in _blobs(image))
    stage.tell(
        f"{downloaded / 1e6:.0f} MB came over HTTP and became {entries:,} files and directories, in "
        f"{seconds:.2f} s with the client's own start: downloaded, hashed, inflated, hashed again, "
        "unpacked and mounted, with both layers at once."
    )
    stage.show("ls bundles/python bundles/python/rootfs")
    stage.tell("A bundle: the mounted root filesystem, and a config.json that a runtime starts as it is.")
    return f"{downloaded / 1e6:.0f} MB, {entries:,} entries, in {seconds:.2f} s"


def _ask(stage: Stage) -> None:
    stage.chapter("What is there, asked with grpcurl")
    service = "grpcurl -plaintext -unix guestpull.sock"
    stage.show(f"{service} list")
    images = stage.show(f"{service} guestpull.v1.ImageService/ListImages")
    stage.show(f"{service} guestpull.v1.ImageService/ListLayers")
    stage.show(f"{service} guestpull.v1.ImageService/ListBundles")
    stage.expect(len(json.loads(images)["images"]) == 1, "one image is in the store")
    stage.tell(
        "Reflection is always on: grpcurl needs no .proto files. `guestpull layers` is the same for people:"
    )
    stage.show("guestpull layers")


def _pull_what_is_new(stage: Stage, image: str) -> None:
    stage.chapter("A second image, that shares its base")
    stage.show(f"guestpull pull {image} --bundle bundles/shop")
    pulled = json.loads(run("guestpull", "layers", "--image", image, "--json", variables=_where(stage)))
    stage.expect(len(pulled) == 3, "the shop has three layers")
    stage.tell("Two of the three layers were there: no request was made for them. Only the shop's own came.")


def _run(stage: Stage, image: str) -> None:
    stage.chapter("A container, as Kata's agent would run it")
    output = stage.show(f"guestpull-agent run --time --bundle-root $PWD/containers {image}")
    stage.expect("I am shop" in output and "= 42" in output, "the container ran as its image's user")
    stage.tell(
        "The stand-in for the agent had the image pulled (nothing to download), merged the pod's specification "
        "into the image's, had runc start it, and released the bundle. The image says USER shop: it was found in "
        "the image's own /etc/passwd."
    )
    stage.show(f"guestpull-agent run --bundle-root $PWD/containers {image} -- head -1 /etc/os-release")
    stage.tell("A command of the pod's own is run instead of the image's Entrypoint and Cmd.")


def _reuse(stage: Stage, image: str) -> None:
    stage.chapter("Another work directory, that downloads nothing")
    stage.show("mkdir other && cp work/meta_store.json other/")
    stage.end("registry")
    stage.tell(
        "The registry is gone. The other work directory has a copy of one file: what layers there are, and where."
    )
    daemon = "guestpulld serve --work-dir other --listen unix://$PWD/other.sock --log-level info"
    stage.start("other", daemon, lambda: listens(stage.directory / "other.sock"))
    address = "--address unix://$PWD/other.sock"
    output = stage.show(f"guestpull {address} pull {image} --policy missing --bundle bundles/again")
    stage.expect("0 of them new" in output, "nothing was downloaded")
    stage.show(
        "ls other/layers | wc -l && findmnt --noheadings --output SOURCE,TARGET --types overlay | grep bundles"
    )
    stage.show(f"guestpull {address} release bundles/again")
    stage.end("other")
    stage.tell("The bundle was mounted from the first work directory's layers; the second one holds none.")


def _let_go(stage: Stage, images: tuple[str, ...]) -> None:
    stage.chapter("Letting go")
    stage.show("guestpull bundles")
    stage.show("guestpull release bundles/python && guestpull release bundles/shop")
    for image in images:
        stage.show(f"guestpull rmi {image}")
    mounts = stage.show("findmnt --noheadings --types overlay | grep -c guestpull-demo || test $? = 1")
    left = stage.show("find work/layers work/overlay work/staging bundles -mindepth 1 | wc -l")
    stage.expect(mounts.strip() == "0" and left.strip() == "0", "no mount and no file is left")
    stage.show("cat work/meta_store.json && echo")
    stage.end("guestpulld")
    stage.show("cat guestpulld.log")
    stage.tell(
        "No mount, no layer, no bundle: deleted when the last image and the last bundle released them."
    )


def listens(path: Path) -> bool:
    """Whether a server listens at a unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _where(stage: Stage) -> dict[str, str]:
    return {"GUESTPULL_ADDRESS": f"unix://{stage.directory}/guestpull.sock"}


def _blobs(image: str) -> list[dict[str, int]]:
    host, _, name = image.partition("/")
    repository, _, tag = name.partition(":")
    url = f"http://{host}/v2/{repository}/manifests/{tag}"
    request = urllib.request.Request(url, headers={"Accept": "application/vnd.oci.image.manifest.v1+json"})
    with urllib.request.urlopen(request) as answer:
        layers: list[dict[str, int]] = json.load(answer)["layers"]
    return layers


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def _answers(host: str) -> bool:
    try:
        urllib.request.urlopen(f"http://{host}/v2/", timeout=5).close()
    except OSError:
        return False
    return True
