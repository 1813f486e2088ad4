"""Where bytes come from: references, authentication, the distribution client.

In: an image reference, a platform, perhaps credentials. Out: a resolved image (digests, config, layers), and
streams of blobs whose bytes are verified before their end is told.

  client.py          RegistryClient: reference -> manifest -> config; the ImageSource that others work with
  blobs.py           one blob, streamed, verified, and resumed where it broke off
  session.py         one exchange with all that it may take: authentication, redirects, retries
  transport.py       HTTP below that: pools, TLS, proxies, deadlines
  authentication.py  Basic and Bearer tokens; challenges.py reads what a registry asks for
  endpoints.py       containers-registries.conf: mirrors, locations, blocked and insecure registries
  credentials.py     containers-auth.json
  manifests.py       manifests, indexes, configs: read, checked, told apart; the choice of a platform
  reference.py       the grammar of references, and Docker's short forms

Nothing here writes to a disk, and nothing here unpacks. Start with `client.RegistryClient.image`.
"""

from guestpull_server.registry.blobs import BlobStream
from guestpull_server.registry.client import ImageSource, RegistryClient
from guestpull_server.registry.reference import Reference

__all__ = ["BlobStream", "ImageSource", "Reference", "RegistryClient"]
