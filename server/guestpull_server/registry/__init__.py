"""Where bytes come from: references, authentication, the distribution client, local files.

In: an image reference, a platform, perhaps credentials. Out: a resolved image (digests, config, layers), and
streams of blobs whose bytes are verified before their end is told.

  source.py          ImageSource and BlobStream: what others work with, wherever an image comes from
  client.py          RegistryClient: the way in; mirrors, and the registry at last
  resolution.py      a reference -> manifest or index -> config; contents.py fetches and verifies these
  manifests.py       manifests, indexes, configs: read, checked, told apart; the choice of a platform
  blobs.py           one blob, streamed, verified, and resumed where it broke off
  session.py         one exchange with all that it may take: authentication, redirects, retries
  failures.py        why one failed, in words
  authentication.py  Basic and Bearer tokens; challenges.py reads what a registry asks for
  transport.py       HTTP: connection pools (connections.py), TLS, proxies.py, and deadlines.py
  urls.py            what may be said of an URL that a server names
  endpoints.py       containers-registries.conf: mirrors, locations, blocked and insecure registries
  credentials.py     containers-auth.json
  local/             open_source: images in files and directories, as skopeo names them
  reference.py       the grammar of references, and Docker's short forms

Nothing here unpacks a layer or knows of the store. Start with `client.RegistryClient.image`, or with
`local.open_source` where no network is wanted.
"""

from guestpull_server.registry.client import RegistryClient
from guestpull_server.registry.local import is_local
from guestpull_server.registry.reference import Reference
from guestpull_server.registry.source import BlobStream, ImageSource, fetch_image
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
