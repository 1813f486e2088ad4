"""ImageService: each method converts the request, calls the core, and converts the result.

The methods run in the event loop; the function that each passes to `Calls.answer` runs in a thread.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import grpc

from guestpull_protos import image_service_pb2 as pb
from guestpull_protos import image_service_pb2_grpc as pb_grpc
from guestpull_server.errors import InvalidRequest
from guestpull_server.models import Credentials, PullPolicy, StoredImage, without_password
from guestpull_server.platforms import Platform
from guestpull_server.pull import PullObserver, PullRequest
from guestpull_server.puller import Puller
from guestpull_server.registry import Reference
from guestpull_server.service import messages
from guestpull_server.service.calls import Call, Calls, Work
from guestpull_server.service.log import FieldValue
from guestpull_server.service.progress import PullEvents

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_POLICIES: Final = {policy.value: policy for policy in PullPolicy}


class ImageServicer(pb_grpc.ImageServiceServicer):
    """Serves one work directory."""

    def __init__(self, puller: Puller, calls: Calls) -> None:
        self._puller = puller
        self._calls = calls

    async def PullImage(  # noqa: N802 - the names are the .proto's
        self, request: pb.PullImageRequest, context: Context
    ) -> pb.PullImageResponse:
        """Pull an image into a bundle."""

        def answer(call: Call) -> pb.PullImageResponse:
            return self._pull(request, call)

        return await self._calls.answer(context, "PullImage", Work.PULL, answer, _pull_fields(request))

    async def PullImageWithProgress(  # type: ignore[override]  # noqa: N802 - it writes instead of yielding
        self, request: pb.PullImageRequest, context: Context
    ) -> None:
        """Like PullImage, and stream progress events."""
        events = PullEvents()

        def answer(call: Call) -> pb.PullImageResponse:
            return self._pull(request, call, events)

        rpc, fields = "PullImageWithProgress", _pull_fields(request)
        pulled = await self._calls.answer(context, rpc, Work.PULL, answer, fields, events)
        await context.write(pb.PullImageEvent(result=pulled))

    async def ListImages(  # noqa: N802
        self, request: pb.ListImagesRequest, context: Context
    ) -> pb.ListImagesResponse:
        """List all images, or those with a reference."""

        def answer(_call: Call) -> pb.ListImagesResponse:
            wanted = str(Reference.parse(request.reference)) if request.reference else None
            store = self._puller.store
            usage = store.usage()
            return pb.ListImagesResponse(
                images=[
                    messages.image_message(image, usage)
                    for image in store.images()
                    if wanted is None or wanted in image.references
                ]
            )

        fields = {"reference": without_password(request.reference)}
        return await self._calls.answer(context, "ListImages", Work.LIST, answer, fields)

    async def ListLayers(  # noqa: N802
        self, request: pb.ListLayersRequest, context: Context
    ) -> pb.ListLayersResponse:
        """List all layers, or those of an image."""

        def answer(_call: Call) -> pb.ListLayersResponse:
            store = self._puller.store
            layers = self._find(request.image).layers if request.image else store.layers()
            unique = {layer.compressed_digest: layer for layer in layers}
            return pb.ListLayersResponse(
                layers=messages.layer_messages(unique.values(), store.usage(), store)
            )

        fields = {"image": without_password(request.image)}
        return await self._calls.answer(context, "ListLayers", Work.LIST, answer, fields)

    async def ListBundles(  # noqa: N802
        self, _request: pb.ListBundlesRequest, context: Context
    ) -> pb.ListBundlesResponse:
        """List the bundles that were not released."""

        def answer(_call: Call) -> pb.ListBundlesResponse:
            return pb.ListBundlesResponse(
                bundles=[messages.bundle_message(bundle) for bundle in self._puller.store.bundles()]
            )

        return await self._calls.answer(context, "ListBundles", Work.LIST, answer, {})

    async def RemoveImage(  # noqa: N802
        self, request: pb.RemoveImageRequest, context: Context
    ) -> pb.RemoveImageResponse:
        """Remove an image, or one of its references."""

        def answer(_call: Call) -> pb.RemoveImageResponse:
            if not request.image:
                raise InvalidRequest("image", "the value is empty", "Give an image id or a reference.")
            image = self._find(request.image)
            reference = Reference.in_full(request.image)
            removal = self._puller.store.remove_image(image, reference, request.force)
            return pb.RemoveImageResponse(
                image_ids=removal.image_ids,
                references=removal.references,
                deleted_layers=removal.deleted_layers,
                freed_bytes=removal.freed_bytes,
            )

        fields: dict[str, FieldValue] = {"image": without_password(request.image), "force": request.force}
        return await self._calls.answer(context, "RemoveImage", Work.DELETE, answer, fields)

    async def ReleaseBundle(  # noqa: N802
        self, request: pb.ReleaseBundleRequest, context: Context
    ) -> pb.ReleaseBundleResponse:
        """Unmount a bundle, and delete its writable layer."""

        def answer(_call: Call) -> pb.ReleaseBundleResponse:
            deleted = self._puller.store.release_bundle(request.bundle_path)
            return pb.ReleaseBundleResponse(deleted_layers=deleted.layers, freed_bytes=deleted.freed_bytes)

        fields = {"bundle": request.bundle_path}
        return await self._calls.answer(context, "ReleaseBundle", Work.DELETE, answer, fields)

    async def CollectGarbage(  # noqa: N802
        self, request: pb.CollectGarbageRequest, context: Context
    ) -> pb.CollectGarbageResponse:
        """Delete the layers that no image, bundle or pull uses."""

        def answer(call: Call) -> pb.CollectGarbageResponse:
            deleted = self._puller.store.collect_unused(request.dry_run)
            call.result_fields.update(layers=len(deleted.layers), bytes=deleted.freed_bytes)
            return pb.CollectGarbageResponse(deleted_layers=deleted.layers, freed_bytes=deleted.freed_bytes)

        fields = {"dry_run": request.dry_run}
        return await self._calls.answer(context, "CollectGarbage", Work.DELETE, answer, fields)

    def _pull(
        self, request: pb.PullImageRequest, call: Call, observer: PullObserver | None = None
    ) -> pb.PullImageResponse:
        pulled = self._puller.pull(_pull_request(request), call.cancellation, observer)
        call.result_fields.update(
            image_id=pulled.image_id,
            layers=len(pulled.layers),
            reused=sum(layer.reused for layer in pulled.layers),
            bytes=pulled.downloaded_bytes,
        )
        return messages.pull_response(pulled)

    def _find(self, image: str) -> StoredImage:
        return self._puller.store.find_image(image, Reference.in_full(image))


def _pull_request(request: pb.PullImageRequest) -> PullRequest:
    """Parse the message.

    Raises:
        InvalidRequest: a field has an invalid value.
        InvalidPlatform: the platform is not valid.
    """
    policy = _POLICIES.get(request.pull_policy)
    if policy is None:
        raise InvalidRequest(
            "pull_policy", f"unknown policy {request.pull_policy}", "Use a value of PullPolicy."
        )
    return PullRequest(
        image=request.image_url,
        bundle_path=request.bundle_path,
        credentials=Credentials.parse(request.auth_info, "auth_info"),
        policy=policy,
        platform=Platform.parse(request.platform) if request.platform else None,
    )


def _pull_fields(request: pb.PullImageRequest) -> dict[str, FieldValue]:
    """Return the log fields of a pull."""
    return {"image": without_password(request.image_url), "bundle": request.bundle_path}
