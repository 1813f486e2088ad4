"""The gRPC contract `guestpull.v1`: image_service.proto and what protoc makes of it.

The `_pb2` modules are generated when the package is built, and never committed. Read the .proto: each
field has its comment there.
"""
