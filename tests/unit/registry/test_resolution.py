"""From a reference to an image at a registry: manifests, indexes, platforms, configs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import msgspec
import pytest

from guestpull_server.cancellation import Cancellation
from guestpull_server.errors import (
    AccessDenied,
    BlobNotFound,
    DigestMismatch,
    ImageNotFound,
    InvalidManifest,
    LimitExceeded,
    NoMatchingPlatform,
    RateLimited,
    RegistryUnavailable,
    SizeMismatch,
    UnsupportedImage,
)
from guestpull_server.models import Digest, ResolvedImage
from guestpull_server.platforms import Platform
from support.faults import Corrupt, Cut, Drip, Endless, Headers, Instead, NoLength, Refuse, Stall, Status
from support.images import (
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Image,
    Json,
    descriptor,
    file,
    image,
    index,
    index_entry,
    layer,
    sha256,
)
from support.pulling import AMD64, PATIENT, ClientOf, Pull
from support.simulator import Fault, RegistrySimulator

BASE = layer(file("etc/hostname", b"guest\n"))
TOP = layer(file("srv/page", b"hello\n"), compression="zstd")
SHOP = image(BASE, TOP, process={"Cmd": ["/bin/sh"]})
ARM = image(BASE, platform="linux/arm64/v8")
RISCV = image(BASE, platform="linux/riscv64")


# -- what a reference stands for ---------------------------------------------------------------------------


@pytest.mark.parametrize("docker", [False, True])
def test_a_tag_stands_for_its_image(registry: RegistrySimulator, pull: Pull, docker: bool) -> None:
    shop = image(BASE, layer(file("a")), docker=docker)
    resolved = pull.resolve(registry.push("org/shop:1.0", shop))

    assert resolved.reference == f"{registry.host}/org/shop:1.0"
    assert resolved.manifest_digest == shop.digest
    assert resolved.image_id == shop.image_id
    assert resolved.config == shop.config
    assert [one.blob.digest for one in resolved.layers] == [one.digest for one in shop.layers]
    assert [one.blob.size for one in resolved.layers] == [one.size for one in shop.layers]
    assert [one.diff_id for one in resolved.layers] == shop.diff_ids


def test_an_image_may_have_no_layers(registry: RegistrySimulator, pull: Pull) -> None:
    assert pull.resolve(registry.push("empty", image())).layers == ()


def test_layers_may_be_null(registry: RegistrySimulator, pull: Pull) -> None:
    assert pull.resolve(registry.push("empty", image(manifest={"layers": None}))).layers == ()


def test_a_digest_is_asked_for_by_digest(registry: RegistrySimulator, pull: Pull) -> None:
    registry.push("shop:1.0", SHOP)
    reference = f"{registry.host}/shop:moved@{SHOP.digest}"

    assert pull.resolve(reference).reference == reference
    assert registry.requests_for("manifests/moved") == []


def test_a_tag_costs_two_requests(registry: RegistrySimulator, pull: Pull) -> None:
    pull.resolve(registry.push("shop", SHOP))
    asked = [request.path for request in registry.requests if request.path != "/v2/"]
    assert asked == ["/v2/shop/manifests/latest", f"/v2/shop/blobs/{SHOP.image_id}"]


def test_all_kinds_of_manifests_are_accepted(registry: RegistrySimulator, pull: Pull) -> None:
    pull.resolve(registry.push("shop", SHOP))
    accepted = registry.requests_for("manifests/latest")[0].headers["accept"]
    assert {one.strip() for one in accepted.split(",")} >= {OCI_INDEX, OCI_MANIFEST, DOCKER_MANIFEST}


def test_a_content_type_that_lies_does_no_harm(registry: RegistrySimulator, pull: Pull) -> None:
    reference = registry.put_manifest("shop", "text/plain; charset=utf-8", SHOP.manifest)
    registry.push("other", SHOP)
    assert pull.resolve(reference).image_id == SHOP.image_id


def test_a_manifest_without_a_media_type_is_what_its_shape_says(
    registry: RegistrySimulator, pull: Pull
) -> None:
    shop = image(BASE, manifest={"mediaType": ""})
    assert pull.resolve(registry.push("shop", shop)).image_id == shop.image_id


# -- what is known already ---------------------------------------------------------------------------------


def known_as(shop: Image) -> ResolvedImage:
    return ResolvedImage("known", Digest(shop.digest), Digest(shop.image_id), shop.config, ())


def test_a_known_manifest_costs_no_further_request(registry: RegistrySimulator, pull: Pull) -> None:
    reference = registry.push("shop:1.0", SHOP)
    known = {SHOP.digest: known_as(SHOP)}

    assert pull.resolve(reference, stored=known.get) == known[SHOP.digest]
    assert registry.requests_for(SHOP.image_id) == []


def test_a_known_manifest_of_an_index_is_not_fetched(registry: RegistrySimulator, pull: Pull) -> None:
    both = index(SHOP, ARM)
    reference = registry.push("shop:1.0", both)
    known = {SHOP.digest: known_as(SHOP)}

    found = pull.resolve(reference, stored=known.get)

    assert found == dataclasses.replace(known[SHOP.digest], index=both.manifest)
    assert registry.requests_for(SHOP) == []


def test_a_known_digest_costs_no_request_at_all(registry: RegistrySimulator, pull: Pull) -> None:
    known = {SHOP.digest: known_as(SHOP)}
    pull.resolve(f"{registry.host}/shop@{SHOP.digest}", stored=known.get)
    assert registry.requests == []


def test_a_known_image_for_another_platform_is_refused(registry: RegistrySimulator, pull: Pull) -> None:
    known = {ARM.digest: known_as(ARM)}
    with pytest.raises(NoMatchingPlatform):
        pull.resolve(f"{registry.host}/shop@{ARM.digest}", stored=known.get)


def test_an_index_that_does_not_say_platforms_is_chosen_from_by_the_configs(
    registry: RegistrySimulator, pull: Pull
) -> None:
    entries = [index_entry(one, platform=None) for one in (ARM, SHOP, RISCV)]
    source = pull.source(registry.push("shop", index(ARM, SHOP, RISCV, entries=entries)))

    manifest = source.manifest(AMD64, Cancellation("pull"))

    assert manifest.digest == SHOP.digest
    asked = len(registry.requests)
    assert source.image(manifest, Cancellation("pull")).image_id == SHOP.image_id
    assert len(registry.requests) == asked


def test_the_bytes_of_the_manifest_and_the_annotations_of_layers_are_kept(
    registry: RegistrySimulator, pull: Pull
) -> None:
    annotated = {**BASE.descriptor, "annotations": {"org.example.key": "value"}}
    shop = image(BASE, manifest={"layers": [annotated]})

    resolved = pull.resolve(registry.push("shop", shop))

    assert resolved.manifest == shop.manifest
    assert resolved.layers[0].blob.annotations == {"org.example.key": "value"}
    assert resolved.layers[0].blob.media_type == BASE.media_type


# -- indexes and platforms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("docker", [False, True])
def test_an_index_stands_for_the_image_of_the_platform(
    registry: RegistrySimulator, pull: Pull, docker: bool
) -> None:
    reference = registry.push("shop", index(SHOP, ARM, docker=docker))

    assert pull.resolve(reference).manifest_digest == SHOP.digest
    assert pull.resolve(reference, Platform("linux", "arm64", "v8")).manifest_digest == ARM.digest


def variants(*platforms: str) -> dict[str, Image]:
    return {one: image(layer(file("etc/platform", one.encode())), platform=one) for one in platforms}


@pytest.mark.parametrize(
    ("wanted", "offered", "chosen"),
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64"], "linux/amd64"),
        ("linux/arm64/v8", ["linux/arm64"], "linux/arm64"),
        ("linux/arm64", ["linux/arm64/v8"], "linux/arm64/v8"),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6", "linux/arm/v7", "linux/arm/v8"], "linux/arm/v7"),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6"], "linux/arm/v6"),
        ("linux/arm", ["linux/arm/v6", "linux/arm/v7"], "linux/arm/v7"),
        ("linux/arm/v6", ["linux/arm/v7", "linux/arm/v5"], "linux/arm/v5"),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"], "linux/amd64/v2"),
        ("linux/amd64", ["linux/amd64/v2", "linux/amd64"], "linux/amd64"),
        ("linux/amd64", ["linux/386", "windows/amd64"], "linux/386"),
        ("linux/amd64", ["linux/386", "linux/amd64"], "linux/amd64"),
        ("linux/arm64/v8", ["linux/arm/v6", "linux/arm/v7"], "linux/arm/v7"),
        ("linux/riscv64", ["linux/amd64", "linux/riscv64"], "linux/riscv64"),
    ],
)
def test_the_nearest_platform_that_runs_is_chosen_as_containerd_does(
    registry: RegistrySimulator, pull: Pull, wanted: str, offered: Sequence[str], chosen: str
) -> None:
    images = variants(*offered)
    reference = registry.push("shop", index(*images.values()))

    assert pull.resolve(reference, Platform.parse(wanted)).manifest_digest == images[chosen].digest


@pytest.mark.parametrize(
    ("wanted", "offered"),
    [
        ("linux/amd64", ["linux/arm64", "linux/s390x"]),
        ("linux/amd64", ["linux/amd64/v2"]),
        ("linux/arm/v6", ["linux/arm/v7"]),
        ("linux/386", ["linux/amd64"]),
        ("linux/amd64", ["windows/amd64"]),
        ("linux/amd64", []),
    ],
)
def test_where_no_platform_fits_the_error_lists_what_there_is(
    registry: RegistrySimulator, pull: Pull, wanted: str, offered: Sequence[str]
) -> None:
    reference = registry.push("shop", index(*variants(*offered).values()))

    with pytest.raises(NoMatchingPlatform) as raised:
        pull.resolve(reference, Platform.parse(wanted))
    assert raised.value.available == ", ".join(offered)


def test_attestations_are_no_images(registry: RegistrySimulator, pull: Pull) -> None:
    attestation = index_entry(SHOP, platform={"os": "unknown", "architecture": "unknown"})
    both = index(SHOP, entries=[attestation, index_entry(SHOP)])
    assert pull.resolve(registry.push("shop", both)).image_id == SHOP.image_id

    alone = registry.push("alone", index(SHOP, entries=[attestation]))
    with pytest.raises(NoMatchingPlatform, match="available: none"):
        pull.resolve(alone)


def test_signatures_in_an_index_are_no_images(registry: RegistrySimulator, pull: Pull) -> None:
    signature = descriptor(b"{}", OCI_MANIFEST, artifactType="application/vnd.example.signature")
    both = index(SHOP, entries=[signature, index_entry(SHOP)])
    assert pull.resolve(registry.push("shop", both)).image_id == SHOP.image_id


def test_an_index_may_list_indexes(registry: RegistrySimulator, pull: Pull) -> None:
    nested = index(index(ARM), index(SHOP))
    assert pull.resolve(registry.push("shop", nested)).manifest_digest == SHOP.digest


def test_an_entry_without_a_platform_is_looked_at(registry: RegistrySimulator, pull: Pull) -> None:
    entries: list[Json] = [descriptor(one.manifest, one.media_type) for one in (ARM, SHOP)]
    assert (
        pull.resolve(registry.push("shop", index(ARM, SHOP, entries=entries))).manifest_digest == SHOP.digest
    )


def test_indexes_that_are_nested_too_deep_are_refused(registry: RegistrySimulator, pull: Pull) -> None:
    nested = index(index(index(index(SHOP))))
    assert pull.resolve(registry.push("deep", nested)).manifest_digest == SHOP.digest
    with pytest.raises(InvalidManifest, match="nested"):
        pull.resolve(registry.push("deeper", index(nested)))


def test_indexes_that_list_too_many_indexes_are_refused(registry: RegistrySimulator, pull: Pull) -> None:
    wide = index(*(index(ARM, manifest={"number": number}) for number in range(40)))
    with pytest.raises(InvalidManifest, match="too many"):
        pull.resolve(registry.push("wide", wide))
    assert len(registry.requests) < 10


@pytest.mark.parametrize("wanted", ["linux/amd64", "linux/arm/v7"])
def test_an_image_for_another_platform_is_refused(
    registry: RegistrySimulator, pull: Pull, wanted: str
) -> None:
    with pytest.raises(NoMatchingPlatform) as raised:
        pull.resolve(registry.push("shop", ARM), Platform.parse(wanted))
    assert raised.value.available == "linux/arm64/v8"


def test_the_variant_in_a_config_is_not_taken_at_its_word(registry: RegistrySimulator, pull: Pull) -> None:
    shop = image(BASE, platform="linux/arm/v7")
    assert pull.resolve(registry.push("shop", shop), Platform.parse("linux/arm/v6")).image_id == shop.image_id


def test_a_config_without_architecture_and_os_is_for_every_linux(
    registry: RegistrySimulator, pull: Pull
) -> None:
    shop = image(BASE, config={"architecture": "", "os": ""})
    assert pull.resolve(registry.push("shop", shop)).image_id == shop.image_id


# -- what is no image --------------------------------------------------------------------------------------

HELM_CONFIG = "application/vnd.cncf.helm.config.v1+json"


@pytest.mark.parametrize(
    ("pushed", "found"),
    [
        (image(BASE, platform="windows/amd64"), "it is built for windows"),
        (image(BASE, config_media_type=HELM_CONFIG), HELM_CONFIG),
        (
            image(config_media_type="application/vnd.oci.empty.v1+json", manifest={"artifactType": "a/sbom"}),
            "a/sbom",
        ),
        (image(layer(media_type=f"{OCI_LAYER}+gzip+encrypted")), "encrypted"),
        (image(layer(media_type="application/vnd.in-toto+json")), "in-toto"),
    ],
)
def test_what_cannot_be_run_is_refused_with_what_was_found(
    registry: RegistrySimulator, pull: Pull, pushed: Image, found: str
) -> None:
    with pytest.raises(UnsupportedImage) as raised:
        pull.resolve(registry.push("thing", pushed))
    assert found in raised.value.found


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    ],
)
def test_a_layer_that_registries_need_not_have_is_one_like_any_other(
    registry: RegistrySimulator, pull: Pull, media_type: str
) -> None:
    shop = image(layer(media_type=media_type))
    assert pull.resolve(registry.push("shop", shop)).image_id == shop.image_id


@pytest.mark.parametrize(
    "manifest",
    [
        {"schemaVersion": 1, "name": "shop", "tag": "1.0", "fsLayers": [], "history": []},
        {"fsLayers": []},
        {"mediaType": "application/vnd.docker.distribution.manifest.v1+prettyjws"},
    ],
)
def test_schema_1_is_refused_by_name(
    registry: RegistrySimulator, pull: Pull, manifest: dict[str, Json]
) -> None:
    reference = registry.put_manifest("old", "application/json", json.dumps(manifest).encode())
    with pytest.raises(UnsupportedImage, match="schema 1"):
        pull.resolve(reference)


def test_another_document_is_refused_with_its_media_type(registry: RegistrySimulator, pull: Pull) -> None:
    reference = registry.put_manifest("thing", "application/vnd.example.thing+json", b'{"schemaVersion": 2}')
    with pytest.raises(UnsupportedImage, match=r"vnd\.example\.thing"):
        pull.resolve(reference)


# -- what is not as it should be ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b"{",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"config": 1, "layers": []}',
        b'{"config": {"digest": "sha256:abc", "size": 1, "mediaType": "%s"}, "layers": []}'
        % b"application/vnd.oci.image.config.v1+json",
        json.dumps({"manifests": [], "layers": []}).encode(),
        json.dumps({"manifests": [{"digest": "../../etc/passwd", "size": 1}]}).encode(),
        json.dumps({"manifests": [{"digest": SHOP.digest, "size": -1}]}).encode(),
        json.dumps({"manifests": [{"digest": SHOP.digest, "size": 1 << 63}]}).encode(),
        json.dumps({"mediaType": OCI_MANIFEST, "manifests": []}).encode(),
    ],
)
def test_a_manifest_that_is_none_is_refused_by_name(
    registry: RegistrySimulator, pull: Pull, manifest: bytes
) -> None:
    reference = registry.put_manifest("broken", OCI_MANIFEST, manifest)
    with pytest.raises(InvalidManifest):
        pull.resolve(reference)


def test_a_web_site_is_no_registry(registry: RegistrySimulator, pull: Pull) -> None:
    page = b"<!doctype html><title>Welcome</title>"
    with pytest.raises(RegistryUnavailable, match="a web page"):
        pull.resolve(registry.put_manifest("shop:1.0", "text/html; charset=utf-8", page))


def test_an_index_that_says_it_is_a_manifest_is_neither(registry: RegistrySimulator, pull: Pull) -> None:
    with pytest.raises(InvalidManifest):
        pull.resolve(registry.push("shop", index(SHOP, manifest={"mediaType": OCI_MANIFEST})))


def test_a_manifest_that_says_it_is_an_index_is_neither(registry: RegistrySimulator, pull: Pull) -> None:
    with pytest.raises(InvalidManifest):
        pull.resolve(registry.push("shop", image(BASE, manifest={"mediaType": OCI_INDEX})))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"rootfs": {"type": "layers", "diff_ids": []}}, "0 diff_ids, the manifest 1 layers"),
        ({"rootfs": {"type": "layers", "diff_ids": [BASE.diff_id] * 2}}, "2 diff_ids"),
        ({"rootfs": None}, "0 diff_ids"),
        ({"rootfs": {"type": "layers", "diff_ids": ["sha256:0"]}}, "invalid diff_id"),
        ({"architecture": 1}, "architecture"),
        (b"not json", "malformed"),
    ],
)
def test_a_config_that_does_not_fit_its_manifest_is_refused(
    registry: RegistrySimulator, pull: Pull, config: dict[str, Json] | bytes, problem: str
) -> None:
    with pytest.raises(InvalidManifest, match=problem):
        pull.resolve(registry.push("shop", image(BASE, config=config)))


def test_the_history_of_a_config_may_have_more_entries_than_layers(
    registry: RegistrySimulator, pull: Pull
) -> None:
    history: list[Json] = [{"created_by": "ENV"}, {"created_by": "CMD", "empty_layer": True}]
    shop = image(BASE, config={"history": history})
    assert pull.resolve(registry.push("shop", shop)).image_id == shop.image_id


# -- digests, sizes and bounds -----------------------------------------------------------------------------


@pytest.mark.parametrize("by_digest", [False, True])
def test_altered_manifests_are_a_digest_mismatch(
    registry: RegistrySimulator, pull: Pull, by_digest: bool
) -> None:
    reference = registry.push("shop:1.0", SHOP)
    target = f"{registry.host}/shop@{SHOP.digest}" if by_digest else reference
    registry.fault(SHOP if by_digest else "manifests/1.0", Corrupt())

    with pytest.raises(DigestMismatch) as raised:
        pull.resolve(target)
    assert raised.value.expected == SHOP.digest


def test_a_manifest_that_was_altered_once_is_asked_for_again(registry: RegistrySimulator, pull: Pull) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", Corrupt(), times=1)
    assert pull.resolve(reference).manifest_digest == SHOP.digest


def test_without_docker_content_digest_the_bytes_of_a_tag_decide(
    registry: RegistrySimulator, pull: Pull
) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.sends_content_digests = False
    assert pull.resolve(reference).manifest_digest == SHOP.digest


@pytest.mark.parametrize("said", [sha256(b"other"), f"sha512:{'0' * 128}"])
def test_a_docker_content_digest_that_is_not_that_of_the_bytes_is_a_mismatch(
    registry: RegistrySimulator, pull: Pull, said: str
) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", Headers((("Docker-Content-Digest", said),)))
    with pytest.raises(DigestMismatch):
        pull.resolve(reference)


def test_a_docker_content_digest_that_is_none_is_nonsense(registry: RegistrySimulator, pull: Pull) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", Headers((("Docker-Content-Digest", "shop"),)))
    with pytest.raises(RegistryUnavailable, match="Docker-Content-Digest"):
        pull.resolve(reference)


def test_an_altered_config_is_a_digest_mismatch(registry: RegistrySimulator, pull: Pull) -> None:
    reference = registry.push("shop", SHOP)
    registry.fault(SHOP.image_id, Corrupt())
    with pytest.raises(DigestMismatch) as raised:
        pull.resolve(reference)
    assert raised.value.expected == SHOP.image_id


@pytest.mark.parametrize("body", [SHOP.config[:-1], SHOP.config + b" "])
def test_a_config_of_another_size_is_a_size_mismatch(
    registry: RegistrySimulator, pull: Pull, body: bytes
) -> None:
    reference = registry.push("shop", SHOP)
    registry.fault(SHOP.image_id, Instead(body))
    with pytest.raises(SizeMismatch):
        pull.resolve(reference)


def test_a_manifest_is_bounded(registry: RegistrySimulator, client_of: ClientOf) -> None:
    limits = msgspec.structs.replace(PATIENT, max_manifest_bytes=1000)
    reference = registry.push("shop", image(BASE, manifest={"annotations": {"a": "x" * 1000}}))
    with pytest.raises(LimitExceeded, match="max_manifest_bytes"):
        Pull(client_of(limits=limits)).resolve(reference)


def test_an_endless_manifest_is_left(registry: RegistrySimulator, pull: Pull) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", Endless())
    with pytest.raises(LimitExceeded, match="max_manifest_bytes"):
        pull.resolve(reference)


def test_a_config_is_bounded(registry: RegistrySimulator, client_of: ClientOf) -> None:
    limits = msgspec.structs.replace(PATIENT, max_config_bytes=100)
    with pytest.raises(LimitExceeded, match="max_config_bytes"):
        Pull(client_of(limits=limits)).resolve(registry.push("shop", SHOP))


def test_the_number_of_layers_is_bounded(registry: RegistrySimulator, client_of: ClientOf) -> None:
    limits = msgspec.structs.replace(PATIENT, max_layers=3)
    with pytest.raises(LimitExceeded, match="max_layers"):
        Pull(client_of(limits=limits)).resolve(registry.push("shop", image(*[BASE] * 4)))


# -- registries that fail ----------------------------------------------------------------------------------


def test_a_tag_that_is_not_there_is_not_found(registry: RegistrySimulator, pull: Pull) -> None:
    with pytest.raises(ImageNotFound):
        pull.resolve(f"{registry.host}/shop:none")


def test_a_config_that_is_not_there_is_not_found(registry: RegistrySimulator, pull: Pull) -> None:
    reference = registry.push("shop", SHOP)
    registry.forget(SHOP.image_id)
    with pytest.raises(BlobNotFound):
        pull.resolve(reference)


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("manifests/1.0", Refuse()),
        ("manifests/1.0", Status(502)),
        ("manifests/1.0", Status(599)),
        ("manifests/1.0", Cut(after=0.5)),
        (SHOP.image_id, Status(500)),
        (SHOP.image_id, Cut(after=0.5)),
    ],
)
def test_what_may_pass_is_tried_again(
    registry: RegistrySimulator, pull: Pull, target: str, fault: Fault
) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault(target, fault, times=1)
    assert pull.resolve(reference).image_id == SHOP.image_id


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("manifests/1.0", Stall(after=0.5)),
        (SHOP.image_id, Drip(after=0.5, bytes_per_second=50)),
    ],
)
def test_what_comes_too_slowly_is_asked_for_again(
    registry: RegistrySimulator, impatient_pull: Pull, target: str, fault: Fault
) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault(target, fault, times=1)
    assert impatient_pull.resolve(reference).image_id == SHOP.image_id


def test_a_manifest_of_no_length_is_read_to_its_end(registry: RegistrySimulator, pull: Pull) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", NoLength())
    assert pull.resolve(reference).image_id == SHOP.image_id


def test_a_registry_that_fails_for_good_is_unavailable(registry: RegistrySimulator, pull: Pull) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", Status(503))

    with pytest.raises(RegistryUnavailable) as raised:
        pull.resolve(reference)
    assert raised.value.host == registry.host
    assert "503" in raised.value.problem
    assert raised.value.attempts == len(registry.requests_for("manifests/1.0")) == PATIENT.max_attempts


def test_what_will_not_pass_is_not_tried_again(registry: RegistrySimulator, pull: Pull) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", Status(400))
    with pytest.raises(RegistryUnavailable, match="400"):
        pull.resolve(reference)
    assert len(registry.requests_for("manifests/1.0")) == 1


def test_403_is_access_denied(registry: RegistrySimulator, pull: Pull) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", Status(403))
    with pytest.raises(AccessDenied):
        pull.resolve(reference)


def test_a_rate_limit_that_lasts_is_told_with_its_end(registry: RegistrySimulator, pull: Pull) -> None:
    reference = registry.push("shop:1.0", SHOP)
    registry.fault("manifests/1.0", Status(429, retry_after="3600"))
    with pytest.raises(RateLimited) as raised:
        pull.resolve(reference)
    assert raised.value.retry_after == "3600"


def test_nobody_is_there(client_of: ClientOf) -> None:
    with RegistrySimulator() as gone:
        reference = gone.push("shop:1.0", SHOP)
    with pytest.raises(RegistryUnavailable, match="refused"):
        Pull(client_of()).resolve(reference)
