"""gRPC in and out: one servicer per service, error -> status, the server's life.

In: RPCs, as image_service.proto has them, and the signals that end a daemon. Out: calls of the storage core
(`Puller`, `Store`), and their results and errors as messages and statuses.

  server.py     the server's life: start, listen, health, reflection, and an end within a grace time
  servicer.py   one method per RPC
  request.py    what each RPC gets: an id, a cancellation, its log lines, and errors as statuses
  progress.py   what PullImageWithProgress streams while a pull runs
  messages.py   the core's nouns -> messages
  status.py     the core's errors -> google.rpc.Status with ErrorInfo
  addresses.py  what --listen may say
  gate.py       the unix socket's door: who connects is asked for its credentials before gRPC sees a byte
  pool.py       the threads that answer RPCs
  sockets.py    unix sockets: the one that everybody finds, and those that nobody does
  log.py        one line an event, for people or as JSON

Nothing here knows how an image is pulled, and no other room knows gRPC. Start with `server.serve`; it is not
exported here, so that the command line can be asked for help without loading gRPC.
"""
