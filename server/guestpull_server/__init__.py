"""guestpull's storage core, its gRPC service and the daemon `guestpulld`.

The rooms, and the way of the data (imports point one way, downwards; import-linter keeps it so):

  cli.py      the commands of `guestpulld`
  service/    gRPC in and out; error -> status; the server's life
  puller.py   the conductor: the order of the steps of a pull, on one page. Start reading there
              (requests.py, what it is asked; admission.py, the queue in front of it; presence.py, what the
              store has already; fetching.py, flights.py and turns.py, downloads that callers share)
  registry/   where bytes come from: references, authentication, the distribution client
  layer/      bytes -> directory: verify, decompress, read tar, extract, whiteouts
  store/      what is on disk: meta_store.json, layers, bundles; locking and recovery
  snapshot/   layers -> mounted rootfs: overlay, and the mount system calls
  bundle/     image config -> OCI runtime config
  config.py models.py errors.py   what every room may know

The core (everything but service/) is a plain synchronous library: a program can pull images with
`guestpull_server.puller.Puller` and never load gRPC.
"""

__version__ = "0.1.0"
