"""Pulling, end to end: what a caller gets is what the image says, by the measure of umoci and runc."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from guestpull_client import PullPolicy
from guestpull_client.errors import DataLoss, FailedPrecondition, NotFound
from guestpull_client.models import LayerDone, Mounted, PulledImage, Resolved
from support.daemon import Daemon
from support.images import Image, directory, file, files, image, index, layer, layer_of_tar, opaque, whiteout
from support.peers import DockerRegistry, grpcurl, run_container, skopeo_copy, unpacked_by_umoci
from support.samples import changes, everything, runnable
from support.simulator import RegistrySimulator
from support.trees import differences, tree


def test_a_rootfs_is_to_the_last_attribute_what_umoci_unpacks(
    daemon: Daemon, docker_registry: DockerRegistry, tmp_path: Path
) -> None:
    reference = docker_registry.push("tree", "1", image(runnable(), everything(), changes()))

    pulled = daemon.client.pull(reference, str(daemon.bundle("one")))

    theirs = unpacked_by_umoci(reference, tmp_path / "umoci")
    # no tar says when a directory without an entry was changed: umoci says now, we say 1970
    implied = ("/", "usr", "usr/share")
    found = differences(tree(pulled.rootfs_path), tree(theirs))
    assert [one for one in found if not one.startswith(tuple(f"{path}: mtime_ns" for path in implied))] == []


def test_whiteouts_of_nothing_leave_no_names_that_cannot_be_found(
    daemon: Daemon, docker_registry: DockerRegistry
) -> None:
    alone = layer(directory("alone"), whiteout("alone/gone"), file("alone/stays"))
    cut_off = layer(directory("alone"), opaque("alone"), whiteout("alone/never"), file("alone/instead"))
    one = docker_registry.push("ghosts", "1", image(runnable(), alone))
    two = docker_registry.push("ghosts", "2", image(runnable(), alone, cut_off))

    first = daemon.client.pull(one, str(daemon.bundle("one")))
    second = daemon.client.pull(two, str(daemon.bundle("two")))

    # overlayfs lists a directory of one layer as it lies there, unless it is told of whiteouts
    assert os.listdir(Path(first.rootfs_path) / "alone") == ["stays"]
    assert os.listdir(Path(second.rootfs_path) / "alone") == ["instead"]


@pytest.mark.parametrize("docker", [False, True], ids=["OCI", "Docker"])
@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_all_manifest_formats_and_compressions_give_the_same(
    daemon: Daemon, docker_registry: DockerRegistry, docker: bool, compression: str
) -> None:
    content = layer(*files("srv", count=50), compression=compression)  # type: ignore[arg-type]
    pushed = image(content, docker=docker and compression != "zstd")
    reference = docker_registry.push(f"formats-{compression}-{docker}".lower(), "1", pushed)

    pulled = daemon.client.pull(reference, str(daemon.bundle("one")))

    assert pulled.image_id == pushed.image_id
    assert pulled.manifest_digest == pushed.digest
    assert pulled.downloaded_bytes == content.size
    assert pulled.layers[0].uncompressed_digest == content.diff_id
    assert len(os.listdir(Path(pulled.rootfs_path) / "srv")) == 50


def test_runc_and_crun_start_the_bundle_as_it_is(daemon: Daemon, docker_registry: DockerRegistry) -> None:
    says = {"Cmd": ["sh", "-c", "id; pwd; echo $GREETING"], "Env": ["GREETING=hello"], "WorkingDir": "/srv"}
    reference = docker_registry.push("run", "1", image(runnable(), process={**says, "User": "shop"}))
    bundle = str(daemon.bundle("one"))

    daemon.client.pull(reference, bundle)

    expected = "uid=1234(shop) gid=1235(shop) groups=1235(shop),2000(audit)\n/srv\nhello\n"
    assert run_container(bundle, f"gp-{os.getpid()}-runc") == expected
    assert run_container(bundle, f"gp-{os.getpid()}-crun", "crun") == expected


def test_a_user_that_the_image_does_not_have_is_an_error_and_never_root(
    daemon: Daemon, docker_registry: DockerRegistry
) -> None:
    reference = docker_registry.push("nobody", "1", image(runnable(), process={"User": "ghost"}))

    with pytest.raises(FailedPrecondition, match="ghost") as caught:
        daemon.client.pull(reference, str(daemon.bundle("one")))

    assert caught.value.reason == "NO_SUCH_USER"
    assert not daemon.bundle("one").exists()
    assert daemon.client.bundles() == ()


def test_an_index_gives_the_platform_that_was_asked_for(
    daemon: Daemon, docker_registry: DockerRegistry
) -> None:
    def built_for(platform: str) -> Image:
        return image(layer(file("platform", platform.encode())), platform=platform)

    both = index(built_for("linux/amd64"), built_for("linux/arm64/v8"), built_for("linux/arm/v7"))
    reference = docker_registry.push("platforms", "1", both)

    for platform in ("linux/amd64", "linux/arm64", "linux/arm64/v8", "linux/arm/v7"):
        bundle = daemon.bundle(platform.replace("/", "-"))
        pulled = daemon.client.pull(reference, str(bundle), platform=platform)
        found = (Path(pulled.rootfs_path) / "platform").read_text()
        assert found.startswith(platform)
    with pytest.raises(FailedPrecondition, match="linux/s390x") as caught:
        daemon.client.pull(reference, str(daemon.bundle("none")), platform="linux/s390x")
    assert caught.value.reason == "NO_MATCHING_PLATFORM"


def test_progress_tells_the_steps_in_order_and_the_result_last(
    daemon: Daemon, docker_registry: DockerRegistry
) -> None:
    pushed = image(runnable(), everything())
    reference = docker_registry.push("progress", "1", pushed)

    events = list(daemon.client.pull_with_progress(reference, str(daemon.bundle("one"))))

    assert isinstance(events[0], Resolved)
    assert [one.compressed_digest for one in events[0].layers] == [one.digest for one in pushed.layers]
    done = [event for event in events if isinstance(event, LayerDone)]
    assert {one.compressed_digest for one in done} == {one.digest for one in pushed.layers}
    assert isinstance(events[-2], Mounted)
    assert isinstance(events[-1], PulledImage)
    assert events[-1].image_id == pushed.image_id


# -- what is there already -----------------------------------------------------------------------------------


def test_a_layer_that_is_there_costs_no_blob_request(daemon: Daemon, registry: RegistrySimulator) -> None:
    base = runnable()
    first = registry.push("first:1", image(base))
    top = layer(file("top", b"new"))
    second = registry.push("second:1", image(base, top))
    daemon.client.pull(first, str(daemon.bundle("one")))
    sent = registry.bytes_sent(base)

    pulled = daemon.client.pull(second, str(daemon.bundle("two")))

    assert registry.bytes_sent(base) == sent == base.size
    assert [one.reused for one in pulled.layers] == [True, False]
    assert pulled.downloaded_bytes == top.size


def test_a_digest_that_is_there_needs_no_network(daemon: Daemon, registry: RegistrySimulator) -> None:
    pushed = image(runnable())
    reference = registry.push("pinned:1", pushed)
    by_digest = f"{reference.rpartition(':')[0]}@{pushed.digest}"
    daemon.client.pull(reference, str(daemon.bundle("one")))
    requests = len(registry.requests)

    pulled = daemon.client.pull(by_digest, str(daemon.bundle("two")))

    assert len(registry.requests) == requests
    assert pulled.image_id == pushed.image_id


@pytest.mark.parametrize("policy", [PullPolicy.UNSPECIFIED, PullPolicy.IF_NOT_PRESENT, PullPolicy.NEVER])
def test_a_pinned_name_of_a_repository_that_nobody_has_asked_is_not_a_name_of_the_image(
    daemon: Daemon, registry: RegistrySimulator, policy: PullPolicy
) -> None:
    pushed = image(runnable())
    tag = registry.push("here:1", pushed)
    daemon.client.pull(tag, str(daemon.bundle("one")))
    elsewhere = f"other.example/there@{pushed.digest}"

    pulled = daemon.client.pull(elsewhere, str(daemon.bundle("two")), policy=policy)

    assert pulled.reference == elsewhere
    assert Path(pulled.rootfs_path, "etc/passwd").exists()
    assert [one.references for one in daemon.client.images()] == [(tag,)]
    with pytest.raises(NotFound):
        daemon.client.remove_image(elsewhere)


def test_a_pinned_name_is_a_name_of_the_image_once_the_registry_has_confirmed_its_repository(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    pushed = image(runnable())
    tag, elsewhere = registry.push("here:1", pushed), registry.push("there:1", pushed)
    by_digest = f"{elsewhere.rpartition(':')[0]}@{pushed.digest}"
    daemon.client.pull(tag, str(daemon.bundle("one")))
    daemon.client.pull(elsewhere, str(daemon.bundle("two")))

    daemon.client.pull(by_digest, str(daemon.bundle("three")))

    assert [one.references for one in daemon.client.images()] == [(tag, elsewhere, by_digest)]


def test_an_index_whose_image_is_there_needs_no_network(daemon: Daemon, registry: RegistrySimulator) -> None:
    pushed = image(runnable())
    both = index(pushed, image(layer(file("arm")), platform="linux/arm64"))
    reference = registry.push("both:1", both)
    by_digest = f"{reference.rpartition(':')[0]}@{both.digest}"
    daemon.client.pull(by_digest, str(daemon.bundle("one")))
    requests = len(registry.requests)

    for policy in (PullPolicy.UNSPECIFIED, PullPolicy.NEVER):
        pulled = daemon.client.pull(by_digest, str(daemon.bundle(policy.name)), policy=policy)
        assert pulled.image_id == pushed.image_id

    assert len(registry.requests) == requests
    assert len(list((daemon.work_dir / "images").iterdir())) == 2
    daemon.client.remove_image(pushed.image_id, force=True)
    assert list((daemon.work_dir / "images").iterdir()) == []


@pytest.mark.parametrize("verify_reuse", ["never", "always"])
def test_a_digest_leads_to_its_image_when_that_has_come_again_in_another_form(
    disk: Path, registry: RegistrySimulator, verify_reuse: str
) -> None:
    gzip, zstd = image(runnable()), image(layer_of_tar(runnable().tar, compression="zstd"))
    assert (gzip.image_id, gzip.digest != zstd.digest) == (zstd.image_id, True)
    both = index(gzip, image(layer(file("arm")), platform="linux/arm64"))
    registry.push("forms:gzip", gzip)
    repository = registry.push("forms:both", both).rpartition(":")[0]
    names = [f"{repository}@{gzip.digest}", f"{repository}@{both.digest}"]
    with Daemon(disk, configuration={"verify_reuse": verify_reuse}) as daemon:
        for number, name in enumerate(names):
            daemon.client.pull(name, str(daemon.bundle(f"first-{number}")))
            daemon.client.release_bundle(str(daemon.bundle(f"first-{number}")))

        again = daemon.client.pull(registry.push("forms:zstd", zstd), str(daemon.bundle("zstd")))

        (listed,) = daemon.client.images()
        assert listed.digest == again.manifest_digest == zstd.digest
        assert [one.compressed_digest for one in daemon.client.layers()] == [zstd.layers[0].digest]
        requests = len(registry.requests)
        for restarts in range(2):
            for number, name in enumerate(names):
                bundle = daemon.bundle(f"again-{restarts}-{number}")
                pulled = daemon.client.pull(name, str(bundle))
                assert (pulled.manifest_digest, pulled.image_id) == (gzip.digest, gzip.image_id)
                assert daemon.client.images()[0].digest == zstd.digest
            daemon.stop()
            daemon.start()
        assert len(registry.requests) == requests


@pytest.mark.parametrize("verify_reuse", ["never", "always"])
def test_an_image_is_not_found_by_a_digest_that_is_not_its_own_whatever_it_is_called(
    disk: Path, registry: RegistrySimulator, verify_reuse: str
) -> None:
    pushed, other = image(runnable()), image(layer(file("other")))
    reference = registry.push("called:1", pushed)
    lie = f"{reference.rpartition(':')[0]}@{other.digest}"
    with Daemon(disk, configuration={"verify_reuse": verify_reuse}) as daemon:
        daemon.client.pull(reference, str(daemon.bundle("one")))
        daemon.client.release_bundle(str(daemon.bundle("one")))
        daemon.stop()
        called = json.dumps(daemon.meta_store()).replace(f'"{reference}"', f'"{lie}"')
        (daemon.work_dir / "meta_store.json").write_text(called)
        daemon.start()

        with pytest.raises(NotFound):
            daemon.client.pull(lie, str(daemon.bundle("two")), policy=PullPolicy.NEVER)
        with pytest.raises(NotFound):
            daemon.client.pull(lie, str(daemon.bundle("two")))


def test_a_tag_that_is_there_costs_one_request(daemon: Daemon, registry: RegistrySimulator) -> None:
    reference = registry.push("warm:1", image(runnable()))
    daemon.client.pull(reference, str(daemon.bundle("one")))
    requests = len(registry.requests)

    daemon.client.pull(reference, str(daemon.bundle("two")))

    assert len(registry.requests) == requests + 1


def test_policies_say_when_the_registry_is_asked(daemon: Daemon, registry: RegistrySimulator) -> None:
    reference = registry.push("policy:1", image(runnable()))
    with pytest.raises(NotFound) as caught:
        daemon.client.pull(reference, str(daemon.bundle("zero")), policy=PullPolicy.NEVER)
    assert caught.value.reason == "IMAGE_NOT_PRESENT"
    assert registry.requests == []

    daemon.client.pull(reference, str(daemon.bundle("one")), policy=PullPolicy.IF_NOT_PRESENT)
    asked = len(registry.requests)
    daemon.client.pull(reference, str(daemon.bundle("two")), policy=PullPolicy.IF_NOT_PRESENT)
    daemon.client.pull(reference, str(daemon.bundle("three")), policy=PullPolicy.NEVER)
    assert len(registry.requests) == asked

    daemon.client.pull(reference, str(daemon.bundle("four")), policy=PullPolicy.ALWAYS)
    assert len(registry.requests) > asked


@pytest.mark.parametrize(
    ("pushed", "wanted"),
    [
        (image(runnable(), config={"architecture": ""}), "linux/amd64"),
        (image(runnable(), platform="linux/386"), "linux/amd64"),
        (image(runnable(), platform="linux/arm/v7"), "linux/arm/v6"),
    ],
    ids=["no architecture", "32 bits", "a newer variant"],
)
def test_an_image_that_the_registry_gave_for_a_platform_is_there_for_it_by_tag_and_by_digest(
    daemon: Daemon, registry: RegistrySimulator, pushed: Image, wanted: str
) -> None:
    tag = registry.push("fits:1", pushed)
    by_digest = f"{tag.rpartition(':')[0]}@{pushed.digest}"
    daemon.client.pull(tag, str(daemon.bundle("always")), policy=PullPolicy.ALWAYS, platform=wanted)
    asked = len(registry.requests)

    for policy in (PullPolicy.NEVER, PullPolicy.IF_NOT_PRESENT):
        for number, name in enumerate((tag, by_digest)):
            bundle = daemon.bundle(f"{policy.name}-{number}")
            pulled = daemon.client.pull(name, str(bundle), policy=policy, platform=wanted)
            assert pulled.image_id == pushed.image_id

    assert len(registry.requests) == asked


def test_a_copied_meta_store_makes_a_second_work_directory_download_nothing(
    disk: Path, registry: RegistrySimulator, tmp_path: Path
) -> None:
    pushed = image(runnable(), everything(), changes())
    reference = registry.push("seed:1", pushed)
    with Daemon(disk) as first:
        ours = first.client.pull(reference, str(first.bundle("one")))
        expected = tree(ours.rootfs_path)
        second_dir = disk / "second"
        second_dir.mkdir()
        (second_dir / "meta_store.json").write_bytes((first.work_dir / "meta_store.json").read_bytes())
        sent = [registry.bytes_sent(one) for one in pushed.layers]

        with Daemon(disk, work_dir=second_dir) as second:
            pulled = second.client.pull(reference, str(second.bundle("two")))

            assert differences(tree(pulled.rootfs_path), expected) == []
            assert all(one.reused for one in pulled.layers)
            assert [registry.bytes_sent(one) for one in pushed.layers] == sent
            assert all(one.read_only and one.present for one in second.client.layers())
            second.client.release_bundle(str(second.bundle("two")))
            removed = second.client.remove_image(reference)
            assert removed.deleted_layers == ()
        assert all(one.present for one in first.client.layers())


def test_a_layer_that_is_missing_on_disk_is_downloaded_again(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    lost, kept = runnable(), everything()
    reference = registry.push("lost:1", image(lost, kept))
    daemon.client.pull(reference, str(daemon.bundle("one")))
    daemon.client.release_bundle(str(daemon.bundle("one")))
    daemon.forget_layer(lost.digest)
    assert [one.present for one in daemon.client.layers(reference)] == [False, True]

    pulled = daemon.client.pull(reference, str(daemon.bundle("two")))

    assert [one.reused for one in pulled.layers] == [False, True]
    assert [one.present for one in daemon.client.layers(reference)] == [True, True]
    entry = daemon.meta_store()["layer_db"][lost.digest]
    assert Path(entry["store_path"]).is_dir()


# -- shapes of images ----------------------------------------------------------------------------------------


def test_an_image_without_layers_is_an_empty_rootfs(daemon: Daemon, docker_registry: DockerRegistry) -> None:
    reference = docker_registry.push("empty", "1", image(process={"Cmd": ["/nothing"]}))

    pulled = daemon.client.pull(reference, str(daemon.bundle("one")))

    assert os.listdir(pulled.rootfs_path) == []
    (Path(pulled.rootfs_path) / "writable").touch()


def test_a_layer_that_occurs_twice_counts_at_its_topmost_place(
    daemon: Daemon, docker_registry: DockerRegistry
) -> None:
    twice = layer(file("winner", b"twice"))
    between = layer(file("winner", b"between"))
    pushed = image(twice, between, twice)
    reference = docker_registry.push("twice", "1", pushed)

    for bundle in ("cold", "warm"):
        pulled = daemon.client.pull(reference, str(daemon.bundle(bundle)))

        assert (Path(pulled.rootfs_path) / "winner").read_bytes() == b"twice"
        assert [one.compressed_digest for one in pulled.layers] == [one.digest for one in pushed.layers]


@pytest.mark.parametrize("warm", [False, True])
def test_a_layer_that_occurs_twice_has_one_diff_id(
    daemon: Daemon, registry: RegistrySimulator, *, warm: bool
) -> None:
    twice = layer(file("winner", b"twice"))
    bogus = f"sha256:{'0' * 64}"
    lie = image(twice, twice, config={"rootfs": {"type": "layers", "diff_ids": [twice.diff_id, bogus]}})
    if warm:
        daemon.client.pull(registry.push("true:1", image(twice)), str(daemon.bundle("true")))
    known = len(daemon.client.images())

    with pytest.raises(DataLoss) as refused:
        daemon.client.pull(registry.push("lie:1", lie), str(daemon.bundle("lie")))

    assert refused.value.reason == "DIGEST_MISMATCH"
    assert len(daemon.client.images()) == known


def test_five_hundred_layers_mount(daemon: Daemon, registry: RegistrySimulator) -> None:
    layers = [layer(file(f"layer/{number}", b"x"), file("top", b"%d" % number)) for number in range(500)]
    reference = registry.push("high:1", image(*layers))

    pulled = daemon.client.pull(reference, str(daemon.bundle("one")))

    assert len(os.listdir(Path(pulled.rootfs_path) / "layer")) == 500
    assert (Path(pulled.rootfs_path) / "top").read_bytes() == b"499"


def test_an_image_that_skopeo_copied_from_another_format_is_the_same(
    daemon: Daemon, docker_registry: DockerRegistry, tmp_path: Path
) -> None:
    reference = docker_registry.push("original", "1", image(runnable(), everything()))
    copy = f"{docker_registry.host}/converted:1"
    skopeo_copy(f"docker://{reference}", f"docker://{copy}", "--format", "v2s2")

    one = daemon.client.pull(reference, str(daemon.bundle("one")))
    other = daemon.client.pull(copy, str(daemon.bundle("two")))

    assert differences(tree(one.rootfs_path), tree(other.rootfs_path)) == []


# -- what is written -----------------------------------------------------------------------------------------


def test_meta_store_is_image_rs_s_to_the_letter(daemon: Daemon, docker_registry: DockerRegistry) -> None:
    pushed = image(
        runnable(),
        process={"Cmd": ["sh"]},
        config={"os.version": "kept", "unheard-of": {"also": [1.5, None]}},
    )
    reference = docker_registry.push("meta", "1", pushed)

    daemon.client.pull(reference, str(daemon.bundle("one")))

    meta = daemon.meta_store()
    only = pushed.layers[0]
    entry = {
        "decoder": "Gzip",
        "encrypted": False,
        "compressed_digest": only.digest,
        "uncompressed_digest": only.diff_id,
        "store_path": str(daemon.work_dir / "layers" / only.digest.replace(":", "_")),
    }
    assert meta["layer_db"] == {only.digest: entry}
    assert meta["snapshot_db"] == {}
    assert meta["image_db"] == {
        pushed.image_id: {
            "id": pushed.image_id,
            "digest": pushed.digest,
            "reference": reference,
            "image_config": json.loads(pushed.config),
            "signed": False,
            "layer_metas": [entry],
        }
    }


def test_grpcurl_alone_can_do_all_of_it(daemon: Daemon, docker_registry: DockerRegistry) -> None:
    reference = docker_registry.push("grpcurl", "1", image(runnable()))
    bundle = str(daemon.bundle("one"))
    service = "guestpull.v1.ImageService"

    (pulled,) = grpcurl(
        daemon.socket, f"{service}/PullImage", {"image_url": reference, "bundle_path": bundle}
    )
    (images,) = grpcurl(daemon.socket, f"{service}/ListImages")
    (layers,) = grpcurl(daemon.socket, f"{service}/ListLayers", {"image": reference})
    (bundles,) = grpcurl(daemon.socket, f"{service}/ListBundles")
    grpcurl(daemon.socket, f"{service}/ReleaseBundle", {"bundle_path": bundle})
    (removed,) = grpcurl(daemon.socket, f"{service}/RemoveImage", {"image": pulled["image_id"]})

    assert images["images"][0]["id"] == pulled["image_id"]
    assert layers["layers"][0]["present"] is True
    assert bundles["bundles"] == [
        {"bundle_path": bundle, "image_id": pulled["image_id"], "reference": reference, "mounted": True}
    ]
    assert removed["deleted_layers"] == [layers["layers"][0]["compressed_digest"]]
    assert os.listdir(daemon.work_dir / "layers") == []
