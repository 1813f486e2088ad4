"""Pulls into a store whose entries say what is not so."""

from __future__ import annotations

import json

import pytest

from guestpull_client.errors import DataLoss
from support.daemon import Daemon
from support.images import file, image, layer
from support.samples import runnable
from support.simulator import RegistrySimulator
from support.stores import lose_metadata


@pytest.mark.parametrize("metadata", ["with our metadata", "without metadata, as of image-rs"])
def test_an_entry_with_a_wrong_diff_id_is_put_right_by_a_pull(
    daemon: Daemon, registry: RegistrySimulator, metadata: str
) -> None:
    shop = image(runnable(), layer(file("a", b"a")))
    reference = registry.push("shop:1", shop)
    daemon.client.pull(reference, str(daemon.bundle("one")))
    daemon.client.release_bundle(str(daemon.bundle("one")))
    daemon.stop()
    meta_store = daemon.meta_store()
    lied = shop.layers[0].digest
    meta_store["layer_db"][lied]["uncompressed_digest"] = shop.layers[1].diff_id
    (daemon.work_dir / "meta_store.json").write_text(json.dumps(meta_store))
    if metadata != "with our metadata":
        lose_metadata(daemon.work_dir)
    daemon.start()

    daemon.client.pull(reference, str(daemon.bundle("two")))

    assert daemon.meta_store()["layer_db"][lied]["uncompressed_digest"] == shop.layers[0].diff_id


def test_an_image_that_lies_of_a_layer_that_is_there_is_refused(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    base = runnable()
    daemon.client.pull(registry.push("shop:1", image(base)), str(daemon.bundle("one")))
    lying = image(base, config={"rootfs": {"type": "layers", "diff_ids": [layer(file("a")).diff_id]}})

    with pytest.raises(DataLoss) as refused:
        daemon.client.pull(registry.push("lying:1", lying), str(daemon.bundle("two")))

    assert refused.value.reason == "DIGEST_MISMATCH"
    assert daemon.meta_store()["layer_db"][base.digest]["uncompressed_digest"] == base.diff_id
