"""Basic and Bearer authentication, and where credentials must never go."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import pytest

from guestpull_server.errors import AccessDenied, InvalidConfiguration, RegistryUnavailable, Unauthenticated
from guestpull_server.models import Credentials
from guestpull_server.registry import RegistryClient
from support.faults import Cut, Instead, RedirectTo, Status
from support.images import files, image, layer
from support.pulling import PATIENT, ClientOf, Pull
from support.simulator import Authentication, Basic, Bearer, Fault, RegistrySimulator, certificate_authority

LAYER = layer(*files("srv", count=10, size=20_000))
SHOP = image(LAYER)
ALICE = Credentials("alice", "wonderland")
MALLORY = Credentials("alice", "guess")


@pytest.fixture
def shop(registry: RegistrySimulator) -> str:
    return registry.push("shop:1.0", SHOP)


@pytest.fixture
def elsewhere() -> Iterator[RegistrySimulator]:
    """Another host."""
    with RegistrySimulator(address="127.0.0.2") as other:
        other.push("shop:1.0", SHOP)
        yield other


@pytest.mark.parametrize("authentication", [Basic(), Bearer("alice", "wonderland")])
def test_credentials_open_the_registry(
    registry: RegistrySimulator, shop: str, pull: Pull, authentication: Authentication
) -> None:
    registry.authentication = authentication
    assert pull.resolve(shop, credentials=ALICE).image_id == SHOP.image_id
    assert pull.blob(shop, LAYER, credentials=ALICE) == LAYER.blob


@pytest.mark.parametrize("authentication", [Basic(), Bearer("alice", "wonderland")])
@pytest.mark.parametrize("credentials", [None, MALLORY])
def test_missing_and_wrong_credentials_are_told_apart(
    registry: RegistrySimulator,
    shop: str,
    pull: Pull,
    authentication: Authentication,
    credentials: Credentials | None,
) -> None:
    registry.authentication = authentication
    with pytest.raises(Unauthenticated) as raised:
        pull.resolve(shop, credentials=credentials)
    assert raised.value.with_credentials is (credentials is not None)


@pytest.mark.parametrize("authentication", [Basic(), Bearer("alice", "wonderland")])
def test_nobody_profits_from_anothers_login(
    registry: RegistrySimulator, shop: str, client: RegistryClient, authentication: Authentication
) -> None:
    registry.authentication = authentication
    pull = Pull(client)
    pull.resolve(shop, credentials=ALICE)

    for stranger in (MALLORY, None):
        with pytest.raises(Unauthenticated):
            pull.resolve(shop, credentials=stranger)
    pull.resolve(shop, credentials=ALICE)


def test_what_is_here_needs_no_credentials_file(
    registry: RegistrySimulator, shop: str, client_of: ClientOf
) -> None:
    known = Pull(client_of()).resolve(shop)
    client = client_of(authenticated_registry_credentials_uri="file:///none/auth.json")

    pinned = f"{registry.host}/shop@{SHOP.digest}"
    assert Pull(client).resolve(pinned, stored=lambda _digest: known) == known
    with pytest.raises(InvalidConfiguration, match="No such file"):
        Pull(client).resolve(shop)


def test_a_password_is_sent_by_its_bytes(registry: RegistrySimulator, shop: str, pull: Pull) -> None:
    registry.authentication = Basic()
    with pytest.raises(Unauthenticated):
        pull.resolve(shop, credentials=Credentials("alice", "\udcff"))
    pair = base64.b64encode(b"alice:\xff").decode()
    assert registry.requests[-1].authorization == f"Basic {pair}"


def test_anonymous_callers_get_tokens_too(registry: RegistrySimulator, shop: str, pull: Pull) -> None:
    registry.authentication = Bearer()
    assert pull.resolve(shop).image_id == SHOP.image_id
    assert registry.requests_for("token")[0].authorization == ""


def test_a_token_is_asked_for_as_the_registry_says(
    registry: RegistrySimulator, shop: str, pull: Pull
) -> None:
    registry.authentication = Bearer("alice", "wonderland")
    pull.resolve(shop, credentials=ALICE)
    assert registry.realm_requests == [
        {"service": "simulator", "scope": "repository:shop:pull", "account": "alice"}
    ]


@pytest.mark.parametrize("key", ["token", "access_token"])
def test_the_token_may_have_either_name(registry: RegistrySimulator, shop: str, pull: Pull, key: str) -> None:
    registry.authentication = Bearer(key=key)
    assert pull.resolve(shop).image_id == SHOP.image_id


def test_a_null_beside_the_token_is_no_token(registry: RegistrySimulator, shop: str, pull: Pull) -> None:
    registry.authentication = Bearer()
    answer = {"token": registry.give_token(), "access_token": None, "expires_in": None}
    registry.fault("token", Instead(json.dumps(answer).encode()))
    assert pull.resolve(shop).image_id == SHOP.image_id


def test_a_token_is_kept_for_the_repository(registry: RegistrySimulator, shop: str, pull: Pull) -> None:
    registry.authentication = Bearer()
    registry.push("other:1.0", SHOP)
    for name in ("shop", "shop", "other"):
        pull.resolve(f"{registry.host}/{name}:1.0")
    assert [asked["scope"] for asked in registry.realm_requests] == [
        "repository:shop:pull",
        "repository:other:pull",
    ]


def test_a_token_that_expired_between_pulls_is_renewed(
    registry: RegistrySimulator, shop: str, pull: Pull
) -> None:
    registry.authentication = Bearer()
    pull.resolve(shop)
    registry.revoke_tokens()
    assert pull.resolve(shop).image_id == SHOP.image_id


def test_a_token_that_expires_within_a_pull_is_renewed(
    registry: RegistrySimulator, shop: str, pull: Pull
) -> None:
    registry.authentication = Bearer(uses=1)
    assert pull.resolve(shop).image_id == SHOP.image_id
    assert pull.blob(shop, LAYER) == LAYER.blob
    assert len(registry.realm_requests) == 3


def test_a_token_that_expires_within_a_blob_is_renewed(
    registry: RegistrySimulator, shop: str, pull: Pull
) -> None:
    registry.authentication = Bearer(uses=1)
    registry.fault(LAYER, Cut(after=0.5), times=1)
    registry.fault(LAYER, Cut(after=0.5), times=1)
    assert pull.blob(shop, LAYER) == LAYER.blob
    assert registry.bytes_sent(LAYER) < 1.1 * LAYER.size


def test_a_registry_that_refuses_its_own_tokens_is_asked_twice_and_no_more(
    registry: RegistrySimulator, shop: str, pull: Pull
) -> None:
    registry.authentication = Bearer()
    registry.fault("token", Instead(b'{"token": "stale"}'))
    with pytest.raises(Unauthenticated):
        pull.resolve(shop)
    assert len(registry.requests_for("manifests/1.0")) == 2


# -- token servers that fail -------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Status(500), Status(429), Cut(after=0.5)])
def test_a_token_server_that_fails_for_a_while_is_asked_again(
    registry: RegistrySimulator, shop: str, pull: Pull, fault: Fault
) -> None:
    registry.authentication = Bearer()
    registry.fault("token", fault, times=2)
    assert pull.resolve(shop).image_id == SHOP.image_id


def test_a_token_server_that_fails_for_good_is_named(
    registry: RegistrySimulator, shop: str, pull: Pull
) -> None:
    registry.authentication = Bearer()
    registry.fault("token", Status(500))
    with pytest.raises(RegistryUnavailable, match="token server"):
        pull.resolve(shop)
    assert len(registry.requests_for("token")) == PATIENT.max_attempts


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"token": 1}',
        b'{"token": "a\\r\\nX-Injected: 1"}',
        b'{"token": "\\u00e9"}',
        b"[" * 99_999,
    ],
)
def test_a_token_server_that_gives_no_token_is_named(
    registry: RegistrySimulator, shop: str, pull: Pull, body: bytes
) -> None:
    registry.authentication = Bearer()
    registry.fault("token", Instead(body))
    with pytest.raises(RegistryUnavailable, match="no token"):
        pull.resolve(shop)


def test_a_token_that_never_ends_is_left(registry: RegistrySimulator, shop: str, pull: Pull) -> None:
    registry.authentication = Bearer()
    registry.fault("token", Instead(b'{"token": "' + b"x" * 1_000_000 + b'"}'))
    with pytest.raises(RegistryUnavailable, match="response too large"):
        pull.resolve(shop)


@pytest.mark.parametrize("expires", ["null", "0", "-1", "0.5", "1" + "0" * 300])
def test_a_strange_lifetime_does_no_harm(
    registry: RegistrySimulator, shop: str, pull: Pull, expires: str
) -> None:
    registry.authentication = Bearer()
    token = registry.give_token()
    registry.fault("token", Instead(f'{{"token": "{token}", "expires_in": {expires}}}'.encode()))
    assert pull.resolve(shop).image_id == SHOP.image_id


@pytest.mark.parametrize(
    "realm",
    [
        "",
        "token",
        "ftp://host/token",
        "http://[::/",
        "http://alice:hunter2@127.0.0.1/token",
        "https:///x",
        "http://host:99999/token",
    ],
)
def test_a_realm_that_cannot_be_asked_is_refused(
    registry: RegistrySimulator, shop: str, pull: Pull, realm: str
) -> None:
    registry.authentication = Bearer()
    registry.challenge = f'Bearer realm="{realm}"'
    with pytest.raises(RegistryUnavailable, match="token server") as raised:
        pull.resolve(shop, credentials=ALICE)
    assert "hunter2" not in str(raised.value)


def test_a_challenge_of_another_kind_cannot_be_met(
    registry: RegistrySimulator, shop: str, pull: Pull
) -> None:
    registry.authentication = Basic()
    registry.challenge = "Negotiate"
    with pytest.raises(Unauthenticated):
        pull.resolve(shop, credentials=ALICE)


# -- where credentials go ----------------------------------------------------------------------------------


@pytest.mark.parametrize("authentication", [Basic(), Bearer()])
def test_a_redirected_blob_is_fetched_without_authorization(
    registry: RegistrySimulator,
    elsewhere: RegistrySimulator,
    shop: str,
    pull: Pull,
    authentication: Authentication,
) -> None:
    registry.authentication = authentication
    registry.fault(LAYER, RedirectTo(elsewhere.url))

    assert pull.blob(shop, LAYER, credentials=ALICE) == LAYER.blob
    assert registry.requests_for(LAYER)[-1].authorization != ""
    assert [request.authorization for request in elsewhere.requests] == [""]


@pytest.mark.parametrize("asked_by", [Basic("mallory", "mallory"), Bearer("mallory", "mallory")])
def test_where_a_registry_redirects_to_can_ask_for_no_password(
    registry: RegistrySimulator,
    elsewhere: RegistrySimulator,
    shop: str,
    pull: Pull,
    asked_by: Authentication,
) -> None:
    elsewhere.authentication = asked_by
    registry.fault(LAYER, RedirectTo(elsewhere.url))

    with pytest.raises(AccessDenied) as raised:
        pull.blob(shop, LAYER, credentials=ALICE)
    assert raised.value.host == elsewhere.host
    assert [request.authorization for request in elsewhere.requests] == [""]


def test_another_port_is_another_host(registry: RegistrySimulator, shop: str, pull: Pull) -> None:
    registry.authentication = Basic()
    with RegistrySimulator() as neighbour:
        neighbour.push("shop:1.0", SHOP)
        registry.fault(LAYER, RedirectTo(neighbour.url))
        assert pull.blob(shop, LAYER, credentials=ALICE) == LAYER.blob
        assert [request.authorization for request in neighbour.requests] == [""]


def test_a_redirect_within_the_registry_keeps_the_authorization(
    registry: RegistrySimulator, shop: str, pull: Pull
) -> None:
    registry.authentication = Basic()
    registry.push("moved:1.0", SHOP)
    registry.fault("v2/shop/manifests/1.0", RedirectTo("/v2/moved/manifests/1.0"))
    assert pull.resolve(shop, credentials=ALICE).image_id == SHOP.image_id


def test_a_redirected_token_request_leaves_the_password_behind(
    registry: RegistrySimulator, elsewhere: RegistrySimulator, shop: str, pull: Pull
) -> None:
    registry.authentication = Bearer("alice", "wonderland")
    registry.fault("token", RedirectTo(elsewhere.url))
    elsewhere.fault("token", Instead(json.dumps({"token": registry.give_token()}).encode()))

    pull.resolve(shop, credentials=ALICE)
    assert [request.authorization for request in elsewhere.requests] == [""]


def test_the_token_server_may_be_elsewhere(
    registry: RegistrySimulator, elsewhere: RegistrySimulator, shop: str, pull: Pull
) -> None:
    registry.authentication = Bearer(realm=f"{elsewhere.url}/token")
    elsewhere.fault("token", Instead(json.dumps({"token": registry.give_token()}).encode()))

    assert pull.resolve(shop, credentials=ALICE).image_id == SHOP.image_id
    pair = base64.b64encode(b"alice:wonderland").decode()
    assert [request.authorization for request in elsewhere.requests] == [f"Basic {pair}"]


def test_a_password_given_over_tls_does_not_go_to_a_plain_token_server(
    elsewhere: RegistrySimulator, client_of: ClientOf
) -> None:
    certificate = certificate_authority().cert_pem.bytes().decode()
    pull = Pull(client_of(extra_root_certificates=[certificate]))
    with RegistrySimulator(tls=True, authentication=Bearer(realm=f"{elsewhere.url}/token")) as registry:
        reference = registry.push("shop:1.0", SHOP)
        with pytest.raises(RegistryUnavailable, match="expected an https URL"):
            pull.resolve(reference, credentials=ALICE)
    assert elsewhere.requests == []


@pytest.mark.parametrize("authentication", [Basic(), Bearer("alice", "wonderland")])
def test_no_error_holds_a_password(
    registry: RegistrySimulator, shop: str, pull: Pull, authentication: Authentication
) -> None:
    registry.authentication = authentication
    with pytest.raises(Unauthenticated) as raised:
        pull.resolve(shop, credentials=Credentials("alice", "hunter2"))
    chain: BaseException | None = raised.value
    while chain is not None:
        assert "hunter2" not in repr(chain) + str(chain)
        chain = chain.__cause__ or chain.__context__
