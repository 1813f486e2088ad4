"""gRPC in and out: one servicer per service, error -> status, the server's life.

In: RPCs, as image_service.proto has them, and the signals that end a daemon. Out: calls of the storage core
(`Puller`, `Store`), and their results and errors as messages and statuses.

  server.py     the server's life: start, listen, health, reflection, and an end within a grace time
  servicer.py   one method per RPC
  calls.py      what each RPC gets: an id, a cancellation, a thread, its log lines, and errors as statuses
  threads.py    the threads in which the core answers
  progress.py   what PullImageWithProgress streams while a pull runs
  health.py     the standard health service
  messages.py   the core's nouns -> messages
  status.py     the core's errors -> google.rpc.Status with ErrorInfo
  addresses.py  what --listen may say
  sockets.py    the unix socket that callers find: its group, its mode, its life
  notify.py     readiness for systemd; its unit is guestpulld.service
  log.py        one line an event, for people or as JSON

gRPC runs in an event loop, so that a stream that waits for its client costs no thread; the synchronous core
works in threads behind it.

Nothing here knows how an image is pulled, and no other room knows gRPC. Start with `server.serve`; it is not
exported here, so that the command line can be asked for help without loading gRPC.
"""
