"""Converts values of the core to messages of image_service.proto."""

from __future__ import annotations

from collections.abc import Iterable

from guestpull_protos import image_service_pb2 as pb
from guestpull_server.models import (
    LayerDescriptor,
    PulledImage,
    PulledLayer,
    ResolvedImage,
    StoredImage,
    StoredLayer,
    platform_of,
)
from guestpull_server.store import Store, StoredBundle, StoreUsage


def pull_response(pulled: PulledImage) -> pb.PullImageResponse:
    """Return the response of PullImage."""
    return pb.PullImageResponse(
        image_id=pulled.image_id,
        manifest_digest=pulled.manifest_digest,
        reference=pulled.reference,
        rootfs_path=pulled.rootfs_path,
        downloaded_bytes=pulled.downloaded_bytes,
        layers=[
            pb.PulledLayer(
                compressed_digest=layer.compressed_digest,
                uncompressed_digest=layer.uncompressed_digest,
                reused=layer.reused,
                downloaded_bytes=layer.downloaded_bytes,
            )
            for layer in pulled.layers
        ],
    )


def resolved_event(image: ResolvedImage) -> pb.PullImageEvent:
    """Return the event that reports the image that a reference resolved to."""
    return pb.PullImageEvent(
        resolved=pb.Resolved(
            reference=image.reference,
            image_id=image.image_id,
            manifest_digest=image.manifest_digest,
            layers=[
                pb.ResolvedLayer(compressed_digest=layer.blob.digest, size_bytes=layer.blob.size)
                for layer in image.layers
            ],
        )
    )


def progress_event(layer: LayerDescriptor, done_bytes: int) -> pb.PullImageEvent:
    """Return the event that reports a layer's progress.

    A registry may send a part twice; `done_bytes` never exceeds the layer's size.
    """
    return pb.PullImageEvent(
        layer_progress=pb.LayerProgress(
            compressed_digest=layer.blob.digest,
            done_bytes=min(done_bytes, layer.blob.size),
            total_bytes=layer.blob.size,
        )
    )


def layer_done_event(layer: PulledLayer) -> pb.PullImageEvent:
    """Return the event that reports that a layer is in the store."""
    return pb.PullImageEvent(
        layer_done=pb.LayerDone(
            compressed_digest=layer.compressed_digest,
            reused=layer.reused,
            downloaded_bytes=layer.downloaded_bytes,
        )
    )


def image_message(image: StoredImage, usage: StoreUsage) -> pb.Image:
    """Return an image as ListImages lists it."""
    sizes = {layer.compressed_digest: max(layer.size_bytes, 0) for layer in image.layers}
    return pb.Image(
        id=image.image_id,
        digest=image.manifest_digest,
        reference=image.references[0] if image.references else "",
        references=image.references,
        layers=[layer.compressed_digest for layer in image.layers],
        size_bytes=sum(sizes.values()),
        platform=str(platform_of(image.config)),
        bundles=usage.bundles_of_image.get(image.image_id, ()),
        read_only_store=image.read_only_store,
    )


def layer_messages(layers: Iterable[StoredLayer], usage: StoreUsage, store: Store) -> Iterable[pb.Layer]:
    """Yield layers as ListLayers lists them."""
    for layer in layers:
        yield pb.Layer(
            compressed_digest=layer.compressed_digest,
            uncompressed_digest=layer.uncompressed_digest,
            decoder=layer.decoder.value,
            encrypted=layer.encrypted,
            store_path=layer.store_path,
            size_bytes=max(layer.size_bytes, 0),
            images=usage.images_of_layer.get(layer.compressed_digest, ()),
            bundles=usage.bundles_of_layer.get(layer.compressed_digest, 0),
            present=store.is_present(layer),
            read_only=store.is_read_only(layer),
        )


def bundle_message(bundle: StoredBundle) -> pb.Bundle:
    """Return a bundle as ListBundles lists it."""
    return pb.Bundle(
        bundle_path=bundle.bundle_path,
        image_id=bundle.image_id,
        reference=bundle.reference,
        mounted=bundle.mounted,
    )
