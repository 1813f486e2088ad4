"""gRPC in and out: one servicer per service, error -> status, the server's life."""
