"""ImageService, one method per RPC: the message in, a call of the core, the message out.

The methods run in the event loop; what each of them hands to `Calls.answer` runs in a thread.
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
    """Answers for one work directory."""

    def __init__(self, puller: Puller, calls: Calls) -> None:
        self._puller = puller
        self._calls = calls

    async def PullImage(  # noqa: N802 - the names are the .proto's
        self, request: pb.PullImageRequest, context: Context
    ) -> pb.PullImageResponse:
        """Make a bundle of an image reference."""

        def answer(call: Call) -> pb.PullImageResponse:
            return self._pull(request, call)

        return await self._calls.answer(context, "PullImage", Work.PULL, answer, _asked(request))

    async def PullImageWithProgress(  # type: ignore[override]  # noqa: N802 - it writes instead of yielding
        self, request: pb.PullImageRequest, context: Context
    ) -> None:
        """Like PullImage, and stream progress events."""
        events = PullEvents()

        def answer(call: Call) -> pb.PullImageResponse:
            return self._pull(request, call, events)

        rpc, asked = "PullImageWithProgress", _asked(request)
        pulled = await self._calls.answer(context, rpc, Work.PULL, answer, asked, events)
        await context.write(pb.PullImageEvent(result=pulled))

    async def ListImages(  # noqa: N802
        self, request: pb.ListImagesRequest, context: Context
    ) -> pb.ListImagesResponse:
        """The images of image_db, or those that have a name."""

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

        asked = {"reference": without_password(request.reference)}
        return await self._calls.answer(context, "ListImages", Work.LIST, answer, asked)

    async def ListLayers(  # noqa: N802
        self, request: pb.ListLayersRequest, context: Context
    ) -> pb.ListLayersResponse:
        """The layers of layer_db, or those of an image."""

        def answer(_call: Call) -> pb.ListLayersResponse:
            store = self._puller.store
            layers = self._find(request.image).layers if request.image else store.layers()
            unique = {layer.compressed_digest: layer for layer in layers}
            return pb.ListLayersResponse(
                layers=messages.layer_messages(unique.values(), store.usage(), store)
            )

        asked = {"image": without_password(request.image)}
        return await self._calls.answer(context, "ListLayers", Work.LIST, answer, asked)

    async def ListBundles(  # noqa: N802
        self, _request: pb.ListBundlesRequest, context: Context
    ) -> pb.ListBundlesResponse:
        """The bundles that were made and not released."""

        def answer(_call: Call) -> pb.ListBundlesResponse:
            return pb.ListBundlesResponse(
                bundles=[messages.bundle_message(bundle) for bundle in self._puller.store.bundles()]
            )

        return await self._calls.answer(context, "ListBundles", Work.LIST, answer, {})

    async def RemoveImage(  # noqa: N802
        self, request: pb.RemoveImageRequest, context: Context
    ) -> pb.RemoveImageResponse:
        """Forget an image, or one of its names."""

        def answer(_call: Call) -> pb.RemoveImageResponse:
            if not request.image:
                raise InvalidRequest("image", "it is empty", "Name an image by its id or its reference.")
            image = self._find(request.image)
            reference = Reference.in_full(request.image)
            removal = self._puller.store.remove_image(image, reference, request.force)
            return pb.RemoveImageResponse(
                image_ids=removal.image_ids,
                references=removal.references,
                deleted_layers=removal.deleted_layers,
                freed_bytes=removal.freed_bytes,
            )

        asked: dict[str, FieldValue] = {"image": without_password(request.image), "force": request.force}
        return await self._calls.answer(context, "RemoveImage", Work.DELETE, answer, asked)

    async def ReleaseBundle(  # noqa: N802
        self, request: pb.ReleaseBundleRequest, context: Context
    ) -> pb.ReleaseBundleResponse:
        """Unmount a bundle, and delete what was written in it."""

        def answer(_call: Call) -> pb.ReleaseBundleResponse:
            deleted = self._puller.store.release_bundle(request.bundle_path)
            return pb.ReleaseBundleResponse(deleted_layers=deleted.layers, freed_bytes=deleted.freed_bytes)

        asked = {"bundle": request.bundle_path}
        return await self._calls.answer(context, "ReleaseBundle", Work.DELETE, answer, asked)

    async def CollectGarbage(  # noqa: N802
        self, request: pb.CollectGarbageRequest, context: Context
    ) -> pb.CollectGarbageResponse:
        """Delete the layers that no image, bundle or pull uses."""

        def answer(call: Call) -> pb.CollectGarbageResponse:
            deleted = self._puller.store.collect_unused(request.dry_run)
            call.outcome.update(layers=len(deleted.layers), bytes=deleted.freed_bytes)
            return pb.CollectGarbageResponse(deleted_layers=deleted.layers, freed_bytes=deleted.freed_bytes)

        asked = {"dry_run": request.dry_run}
        return await self._calls.answer(context, "CollectGarbage", Work.DELETE, answer, asked)

    def _pull(
        self, request: pb.PullImageRequest, call: Call, observer: PullObserver | None = None
    ) -> pb.PullImageResponse:
        pulled = self._puller.pull(_pull_request(request), call.cancellation, observer)
        call.outcome.update(
            image_id=pulled.image_id,
            layers=len(pulled.layers),
            reused=sum(layer.reused for layer in pulled.layers),
            bytes=pulled.downloaded_bytes,
        )
        return messages.pull_response(pulled)

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


def _asked(request: pb.PullImageRequest) -> dict[str, FieldValue]:
    """What the log says of a request to pull."""
    return {"image": without_password(request.image_url), "bundle": request.bundle_path}
