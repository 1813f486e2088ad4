"""From a stream of bytes to a directory that overlayfs can use.

In: the compressed bytes of one layer, in order. Out: a staging directory in overlayfs form, and the digest
of the tar that was in the stream; the caller compares the digests and renames the directory into place.

  workers.py      the daemon's side: ask the fork server for a layer worker, feed it, hear its result
  fork_server.py  the small single-threaded process that forks a worker for each layer
  worker.py       the child process: confine itself, then inflate -> hash -> read tar -> extract
  confinement.py  chroot into the staging directory; drop the capabilities that unpacking does not need
  inflate.py      compressed bytes -> buffers of tar bytes: gzip, zstd or plain, by what the bytes are
  tar_reader.py   tar bytes -> entries; knows ustar, pax, GNU; bounds every header
  tar_fields.py   the fields of tar headers: octal and base-256 numbers, pax records
  sparse.py       the maps of GNU's sparse files, in their four forms
  extract.py      one entry -> system calls
  directories.py  where the extraction stands, and which times the directories around it must get back
  whiteout.py     OCI whiteouts -> overlayfs's
  messages.py     what daemon, fork server and worker say to each other

Nothing here knows of registries, images or the store. Start with `worker.unpack`.
"""

from guestpull_server.layer.workers import LayerWorker, LayerWorkers

__all__ = ["LayerWorker", "LayerWorkers"]
