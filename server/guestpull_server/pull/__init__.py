"""The pipeline: from a request to an image whose layers are in the store.

In: what a caller asks for (`ImageRequest`). Out: a resolved image and its layers, which stay in the store as
long as the caller works with them (`Acquired`). Pulls, bakes and repairs all go through `Acquirer.acquire`; what
is special to one of them is done before or after it, by puller.py and upkeep/.

  requests.py            what is asked for, and who observes the progress
  admission.py           the queue in front of all pulls; fair_semaphore.py shares turns among registries
  acquire.py             the order of the steps: resolve, verify, pin, fetch
  local_resolver.py      resolves references from the local store, subject to the pull policy
  layer_verification.py  verifies layers that are in the store before they are reused
  layer_fetcher.py       all layers of one image: reused, or downloaded
  shared_downloads.py    one download for each layer and registry, whoever waits for it
  sessions.py            the open store and what works with it; replaced when the work directory is

Nothing here mounts or writes a bundle. Start with `acquire.Acquirer`.
"""

from guestpull_server.pull.acquire import Acquired, check_request
from guestpull_server.pull.admission import Admission, AdmittedPull
from guestpull_server.pull.requests import ImageRequest, PullObserver, PullRequest, Purpose, Unobserved
from guestpull_server.pull.sessions import Background, Sessions, StoreSession

__all__ = [
    "Acquired",
    "Admission",
    "AdmittedPull",
    "Background",
    "ImageRequest",
    "PullObserver",
    "PullRequest",
    "Purpose",
    "Sessions",
    "StoreSession",
    "Unobserved",
    "check_request",
]
