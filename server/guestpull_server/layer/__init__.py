"""Unpacks a layer from a stream of bytes into a directory for overlayfs, and verifies such directories.

In: the compressed bytes of one layer, in order. Out: a staging directory in overlayfs form, and the digest of the
tar in the stream. The caller compares the digests and renames the directory into place. Later, if a tar-split was
kept: whether the directory still is that layer.

Workers
  workers.py         the daemon's side: start a worker, feed it, read its result
  ring.py            the shared memory that carries the bytes to the worker
  fork_client.py     asks the fork server for worker processes
  fork_server.py     the small single-threaded process that forks a worker for each layer
  worker_protocol.py the messages between daemon, fork server and worker
  worker.py          the worker that unpacks: confine, then inflate -> hash -> read tar -> extract
  verifier.py        the worker that verifies
  confinement.py     chroot into the staging directory; drop capabilities

Tar
  inflate.py         decompresses gzip, zstd or plain bytes into buffers of tar bytes
  tar_reader.py      tar bytes -> entries (tar_entry.py): ustar, pax, GNU; bounds every header
  tar_bytes.py       the reader's position in the buffers
  tar_extensions.py  extension headers; tar_fields.py: numbers, times, pax records; sparse.py: maps of sparse files
  refusals.py        the errors of a layer that is refused

Applying entries
  apply.py           the rules: limits, whiteouts, types; the same for extraction and verification
  directory_stack.py the way to an entry's parent; tar_paths.py: clean paths, links below the root
  extract.py         makes files; directories.py: its directory stack; removal.py: what later entries replace
  replay.py          makes nodes of the expected tree (expected.py)
  whiteout.py        OCI whiteouts -> overlayfs's

Verifying
  tar_split.py       the tar without the contents of its files
  proof.py           verify_layer: tar-split + directory -> tar -> diff_id; and the tree, in every attribute
  comparison.py      the expected tree against the directory (unpacked_tree.py, stored_content.py)
  changes.py         the differences
  inspection.py      inspect_layer: what can be checked without a tar-split

Nothing here knows registries, images or the store. Start with `worker.unpack`, then `proof.verify_layer`.
"""

from guestpull_server.layer.changes import Change, ChangeKind
from guestpull_server.layer.inspection import inspect_layer
from guestpull_server.layer.proof import implied_fingerprint, verify_layer
from guestpull_server.layer.workers import LayerWorker, LayerWorkers

__all__ = [
    "Change",
    "ChangeKind",
    "LayerWorker",
    "LayerWorkers",
    "implied_fingerprint",
    "inspect_layer",
    "verify_layer",
]
