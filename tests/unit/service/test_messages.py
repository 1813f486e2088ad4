"""Converting values of the core to messages."""

from __future__ import annotations

from guestpull_server.models import Descriptor, Digest, LayerDescriptor
from guestpull_server.service import messages

BLOB = Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", Digest.of(b"blob"), 1000)
LAYER = LayerDescriptor(BLOB, Digest.of(b"tar"))


def test_progress_never_exceeds_the_layers_size() -> None:
    progress = messages.progress_event(LAYER, 1800).layer_progress

    assert (progress.done_bytes, progress.total_bytes) == (1000, 1000)
