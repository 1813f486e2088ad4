"""ImageService, one method per RPC: the message in, a call of the core, the message out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import grpc

from guestpull_protos import image_service_pb2 as pb
from guestpull_protos import image_service_pb2_grpc as pb_grpc
from guestpull_server.errors import InvalidRequest
from guestpull_server.models import Credentials, PulledImage, PullPolicy, StoredImage, without_password
from guestpull_server.platforms import Platform
from guestpull_server.puller import Puller
from guestpull_server.registry import Reference
from guestpull_server.requests import PullObserver, PullRequest
from guestpull_server.service import messages
from guestpull_server.service.log import Fact
from guestpull_server.service.progress import PullEvents
from guestpull_server.service.request import answering

_POLICIES: Final = {policy.value: policy for policy in PullPolicy}


class ImageServicer(pb_grpc.ImageServiceServicer):
    """Answers for one work directory."""

    def __init__(self, puller: Puller) -> None:
        self._puller = puller

    def PullImage(  # noqa: N802 - the names are the .proto's
        self, request: pb.PullImageRequest, context: grpc.ServicerContext
    ) -> pb.PullImageResponse:
        """An image reference -> a bundle that a runtime can start."""
        with answering(context, "PullImage", **_asked(request)) as answered:
            pulled = self._puller.pull(_pull_request(request), answered.cancellation)
            answered.outcome.update(_outcome(pulled))
            return messages.pull_response(pulled)

    def PullImageWithProgress(  # noqa: N802
        self, request: pb.PullImageRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.PullImageEvent]:
        """The same, telling what happens meanwhile."""
        with answering(context, "PullImageWithProgress", **_asked(request)) as answered:
            wanted = _pull_request(request)

            def pull(observer: PullObserver) -> PulledImage:
                pulled = self._puller.pull(wanted, answered.cancellation, observer)
                answered.outcome.update(_outcome(pulled))
                return pulled

            yield from PullEvents().of(pull)

    def ListImages(  # noqa: N802
        self, request: pb.ListImagesRequest, context: grpc.ServicerContext
    ) -> pb.ListImagesResponse:
        """What image_db holds; all of it, or what has a name."""
        with answering(context, "ListImages", reference=without_password(request.reference)):
            wanted = str(Reference.parse(request.reference)) if request.reference else None
            usage = self._puller.store.usage()
            return pb.ListImagesResponse(
                images=[
                    messages.image_message(image, usage)
                    for image in self._puller.store.images()
                    if wanted is None or wanted in image.references
                ]
            )

    def ListLayers(  # noqa: N802
        self, request: pb.ListLayersRequest, context: grpc.ServicerContext
    ) -> pb.ListLayersResponse:
        """What layer_db holds; all of it, or an image's layers."""
        with answering(context, "ListLayers", image=without_password(request.image)):
            layers = self._find(request.image).layers if request.image else self._puller.store.layers()
            unique = {layer.compressed_digest: layer for layer in layers}
            usage = self._puller.store.usage()
            return pb.ListLayersResponse(
                layers=messages.layer_messages(unique.values(), usage, self._puller.store)
            )

    def ListBundles(  # noqa: N802
        self, _request: pb.ListBundlesRequest, context: grpc.ServicerContext
    ) -> pb.ListBundlesResponse:
        """The bundles that were made and not released."""
        with answering(context, "ListBundles"):
            return pb.ListBundlesResponse(
                bundles=[messages.bundle_message(bundle) for bundle in self._puller.store.bundles()]
            )

    def RemoveImage(  # noqa: N802
        self, request: pb.RemoveImageRequest, context: grpc.ServicerContext
    ) -> pb.RemoveImageResponse:
        """Forget an image, or one of its names."""
        with answering(context, "RemoveImage", image=without_password(request.image), force=request.force):
            if not request.image:
                raise InvalidRequest("image", "it is empty", "Name an image by its id or its reference.")
            image = self._find(request.image)
            removal = self._puller.store.remove_image(image, Reference.in_full(request.image), request.force)
            return pb.RemoveImageResponse(
                image_ids=removal.image_ids,
                references=removal.references,
                deleted_layers=removal.deleted_layers,
                freed_bytes=removal.freed_bytes,
            )

    def ReleaseBundle(  # noqa: N802
        self, request: pb.ReleaseBundleRequest, context: grpc.ServicerContext
    ) -> pb.ReleaseBundleResponse:
        """Unmount a bundle, and delete what was written in it."""
        with answering(context, "ReleaseBundle", bundle=request.bundle_path):
            deleted = self._puller.store.release_bundle(request.bundle_path)
            return pb.ReleaseBundleResponse(deleted_layers=deleted.layers, freed_bytes=deleted.freed_bytes)

    def CollectGarbage(  # noqa: N802
        self, request: pb.CollectGarbageRequest, context: grpc.ServicerContext
    ) -> pb.CollectGarbageResponse:
        """Delete the layers that no image, bundle or pull uses."""
        with answering(context, "CollectGarbage", dry_run=request.dry_run) as answered:
            deleted = self._puller.store.collect_unused(request.dry_run)
            answered.outcome.update(layers=len(deleted.layers), bytes=deleted.freed_bytes)
            return pb.CollectGarbageResponse(deleted_layers=deleted.layers, freed_bytes=deleted.freed_bytes)

    def _find(self, image: str) -> StoredImage:
        return self._puller.store.find_image(image, Reference.in_full(image))


def _pull_request(request: pb.PullImageRequest) -> PullRequest:
    """Read the message.

    Raises:
        InvalidRequest: a field cannot be used as it is.
        InvalidPlatform: the platform is none.
    """
    policy = _POLICIES.get(request.pull_policy)
    if policy is None:
        raise InvalidRequest("pull_policy", f"there is no policy {request.pull_policy}", "Use a named one.")
    return PullRequest(
        image=request.image_url,
        bundle_path=request.bundle_path,
        credentials=Credentials.parse(request.auth_info, "auth_info"),
        policy=policy,
        platform=Platform.parse(request.platform) if request.platform else None,
    )


def _asked(request: pb.PullImageRequest) -> dict[str, Fact]:
    """What the log says of a request to pull."""
    return {"image": without_password(request.image_url), "bundle": request.bundle_path}


def _outcome(pulled: PulledImage) -> dict[str, Fact]:
    """What the log says of a pull."""
    return {
        "image_id": pulled.image_id,
        "layers": len(pulled.layers),
        "reused": sum(layer.reused for layer in pulled.layers),
        "bytes": pulled.downloaded_bytes,
    }
