"""The gRPC service: one servicer per service, errors as statuses, start and shutdown.

In: the RPCs of image_service.proto, and the signals that stop a daemon. Out: calls of the storage core
(`Puller`, `Store`), and their results and errors as messages and statuses.

  server.py     starts the server, listens, and shuts down within a grace period
  servicer.py   one method per RPC
  calls.py      runs each RPC: id, cancellation, thread, log lines, errors as statuses
  threads.py    thread pools that run the RPCs
  progress.py   the events that PullImageWithProgress streams
  health.py     the standard health service
  messages.py   values of the core -> messages
  status.py     errors of the core -> google.rpc.Status with ErrorInfo
  addresses.py  parses the addresses of --listen
  sockets.py    publishes the unix socket with its group and mode, and removes it
  notify.py     reports readiness to systemd; the unit is guestpulld.service
  log.py        writes each event as one line, as text or JSON

gRPC runs in an event loop, so that a stream that waits for its client does not occupy a thread. The synchronous
core runs in threads.

Nothing here knows how an image is pulled, and no other package imports gRPC. Start with `server.serve`. It is
not exported here, so that the command line prints its help without loading gRPC.
"""
