"""The pipeline: from a request to an image whose layers are in the store.

In: an `ImageRequest`. Out: a resolved image and its layers, which stay in the store as long as the caller works
with them (`Acquired`). Pulls, bakes and repairs all call `Acquirer.acquire`; puller.py and upkeep/ do before and
after it what only one of them needs.

  requests.py            requests, and the observer of their progress
  admission.py           the queue in front of all pulls; fair_semaphore.py shares turns among registries
  acquire.py             the order of the steps: resolve, verify, pin, fetch
  local_resolver.py      resolves references from the local store, subject to the pull policy
  layer_verification.py  verifies layers of the store before they are reused
  layer_fetcher.py       gets all layers of one image: reuses or downloads each
  shared_downloads.py    one download for each layer and registry, shared by its callers
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
