"""What the core knows, as messages."""

from __future__ import annotations

from guestpull_server.models import Descriptor, Digest, LayerDescriptor
from guestpull_server.service import messages

BLOB = Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", Digest.of(b"blob"), 1000)
LAYER = LayerDescriptor(BLOB, Digest.of(b"tar"))


def test_a_layer_of_which_a_part_came_twice_is_never_further_than_its_end() -> None:
    progress = messages.progress_event(LAYER, 1800).layer_progress

    assert (progress.done_bytes, progress.total_bytes) == (1000, 1000)
