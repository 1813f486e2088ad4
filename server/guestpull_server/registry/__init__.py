"""Reads images from registries and local files.

In: an image reference, a platform, optional credentials. Out: a resolved image (digests, config, layers), and
streams of blobs whose size and digest are verified before they end.

  sources.py         open_source: the source that a name stands for
  image_source.py    the interface of all sources: ImageSource, ResolvedManifest, BlobStream
  client.py          RegistryClient: images at registries and their mirrors
  resolution.py      a reference -> manifest or index -> config
  documents.py       fetches manifests and configs, and verifies their digests
  manifests.py       parses manifests, indexes and configs; chooses the platform
  blobs.py           streams one blob: verified, and resumed after failures
  session.py         requests with authentication, redirects and retries
  failures.py        descriptions of failed requests
  authentication.py  Basic and Bearer; challenges.py parses WWW-Authenticate
  transport.py       HTTP: TLS, proxies.py, and connections.py, whose waits deadlines.py bounds
  urls.py            checks of URLs from untrusted input
  endpoints.py       containers-registries.conf: mirrors, locations, blocked and insecure registries
  credentials.py     containers-auth.json
  reference.py       the grammar of references, with Docker's short names
  local/             images in files and directories

Nothing here unpacks a layer or knows the store. Start with `sources.open_source`.
"""

from guestpull_server.registry.client import RegistryClient
from guestpull_server.registry.image_source import BlobStream, ImageSource, fetch_image
from guestpull_server.registry.local import is_local
from guestpull_server.registry.reference import Reference
from guestpull_server.registry.sources import open_source

__all__ = [
    "BlobStream",
    "ImageSource",
    "Reference",
    "RegistryClient",
    "fetch_image",
    "is_local",
    "open_source",
]
