"""From a stream of bytes to a directory that overlayfs can use.

In: the compressed bytes of one layer, in order. Out: a staging directory in overlayfs form, and the digest
of the tar that was in the stream; the caller compares the digests and renames the directory into place. Later,
if a record was kept: whether the directory still is that layer.

  workers.py         the daemon's side: start a layer worker, feed it, hear its result
  ring.py            the memory by which the bytes come to the worker
  fork_client.py     ask the fork server for worker processes, hear them, kill them
  fork_server.py     the small single-threaded process that forks a worker for each layer
  worker.py          the child process: confine itself, then inflate -> hash -> read tar -> extract
  verifier.py        another kind of worker: proves a layer
  confinement.py     chroot into the staging directory; drop the capabilities that the work does not need
  worker_protocol.py what daemon, fork server and worker say to each other

  inflate.py         compressed bytes -> buffers of tar bytes: gzip, zstd or plain, by what the bytes are
  tar_reader.py      tar bytes -> entries (tar_entry.py); knows ustar, pax, GNU; bounds every header
  tar_bytes.py       where the reader stands in the buffers; tells a recorder what it passes
  tar_extensions.py  headers in front of an entry; tar_fields.py: numbers, times, pax records
  sparse.py          the maps of GNU's sparse files, in their four forms

  extract.py         one entry -> system calls; tar_paths.py: what its path means
  directories.py     where the extraction stands, and which times the directories around it must get back
  whiteout.py        OCI whiteouts -> overlayfs's
  removal.py         what goes away when an entry replaces another

  tar_split.py       all of the tar but the contents of its files: kept, to prove the directory by
  proof.py           verify_layer: record + directory -> tar -> diff_id; and the tree, to every attribute
  replay.py          the extraction again, on a tree in memory (expected.py)
  comparison.py      that tree against the directory (unpacked_tree.py, stored_content.py); changes.py: findings
  implied.py         which directories the tar has no entries for, as a fingerprint
  inspection.py      what can be said of a layer that has no record

Nothing here knows of registries, images or the store. Start with `worker.unpack`, then `proof.verify_layer`.
"""

from guestpull_server.layer.changes import Change, ChangeKind
from guestpull_server.layer.implied import implied_fingerprint
from guestpull_server.layer.inspection import inspect_layer
from guestpull_server.layer.proof import verify_layer
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
