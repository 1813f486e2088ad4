"""The configuration: the keys of image-rs's `ImageConfig`, our own keys, and all limits with their units.

The configuration is read from `<work_dir>/config.json` or the file that `--config` names. All keys are
optional. An unknown key causes a warning, because image-rs may add keys; a value of a wrong type causes an
error that names the key.
"""

from __future__ import annotations

import os
from enum import Enum
from typing import Annotated, Any, Literal

import msgspec

from guestpull_server.errors import InvalidConfiguration
from guestpull_server.models import GiB, KiB, MiB, without_password

DEFAULT_WORK_DIR = "/run/kata-containers/image"
MIN_DESCRIPTORS = 64  # open files; an idle daemon has 24, and gRPC aborts the process if it gets none
FILE_NAME = "config.json"


A_YEAR = 366 * 24 * 3600  # seconds; a few of these overflow no clock of the operating system
_Count = Annotated[int, msgspec.Meta(ge=1)]
_Amount = Annotated[int, msgspec.Meta(ge=0)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=A_YEAR)]
_WholeSeconds = Annotated[int, msgspec.Meta(ge=1, le=A_YEAR)]
_Delay = Annotated[float, msgspec.Meta(ge=0, le=A_YEAR)]


class VerifyReuse(Enum):
    """When to verify that a reused layer matches its image, before it is mounted."""

    NEVER = "never"
    MOUNT = "mount"
    """Once per run of the daemon. It does not notice changes that root makes in the layer afterwards."""
    ALWAYS = "always"


class LayerNames(Enum):
    """How to name directories in layers/: by digest, or by a running number, as image-rs does since 2025."""

    DIGEST = "digest"
    INDEX = "index"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on the cost of an image, a registry or a caller.

    A violation raises LimitExceeded, which names the field. Sizes are in bytes, times in seconds.
    """

    # -- responses of a registry
    max_manifest_bytes: _Count = 4 * MiB  # the distribution specification asks registries to accept this
    max_config_bytes: _Count = 8 * MiB  # image configs with long histories stay below 1 MiB
    max_layers: _Count = 500  # overlayfs stacks at most this many (OVL_MAX_STACK)

    # -- content of one layer
    max_layer_bytes: _Count = 64 * GiB  # contents of files; the largest ML images have layers of about 20 GiB
    max_layer_entries: _Count = 10_000_000  # enough for any image, small enough to stop a bomb
    max_compression_ratio: _Count = (
        2000  # deflate reaches at most 1032; zstd of an all-zero disk exceeds that
    )
    max_implied_directories: _Count = 100_000  # each is recorded; real layers have few or none
    max_implied_path_bytes: _Count = 8 * MiB  # all their paths together
    max_path_bytes: _Count = 4096  # PATH_MAX
    max_path_depth: _Count = 256  # components; deep enough for node_modules, shallow enough to walk
    max_header_bytes: _Count = 1 * MiB  # one pax or GNU extension header, as in Go's archive/tar
    max_xattr_bytes: _Count = 64 * KiB  # one value; XATTR_SIZE_MAX
    max_zstd_window_bytes: _Count = 128 * MiB  # the zstd command's default for decoding

    # -- creation of one bundle
    max_config_strings: _Count = 100_000  # counted by quotation marks; long shell commands have many
    max_volumes: _Count = 256  # each may be a mount in the container; real images have a handful
    volume_bytes: _Count = (
        1 * GiB
    )  # size of a volume's tmpfs, which is memory; the kernel's default is half of it
    max_lookup_steps: _Count = 100_000  # path components; 256 volumes 100 directories deep take 25,600
    max_read_bytes: _Count = 4 * MiB  # of /etc/passwd, and of /etc/group; about 50,000 accounts
    max_groups: _Count = 65_536  # of the process; NGROUPS_MAX

    # -- requests to a registry
    connect_timeout: _Seconds = 10.0
    read_timeout: _Seconds = 30.0  # without a single byte
    min_bytes_per_second: _Amount = 1024  # averaged over read_timeout; a slower connection counts as stalled
    max_attempts: _Count = 6  # of one request, including the first
    max_retry_delay: _Delay = 30.0  # also the longest Retry-After that is honoured
    max_redirects: _Amount = 5

    # -- unused content
    # keep layers of a failed pull for the next attempt; kubelet waits at most 5 minutes between two
    unused_layer_seconds: _WholeSeconds = 900

    # -- concurrent calls
    max_concurrent_pulls: _Count = 64  # resolving at one registry; and as many working on this machine
    max_queued_pulls: _Count = 320  # running or waiting; more fail with RESOURCE_EXHAUSTED
    max_queued_pulls_per_registry: _Count = 256  # likewise; a registry that hangs leaves room for others
    # of one pull, including waiting; a caller's deadline may be shorter
    max_pull_seconds: _WholeSeconds = 3600
    # downloaded and unpacked at once, over all pulls; a worker takes 28 MiB. One registry gets at most half
    max_concurrent_layers: _Count = 16
    max_concurrent_lists: _Count = 16  # threads; a list takes milliseconds
    max_concurrent_deletions: _Count = 16  # threads that remove, release or collect; they may wait for a disk
    max_request_bytes: _Count = 1 * MiB  # one message; image names and credentials are far smaller
    max_connections: _Count = 512  # each takes a descriptor; the usual limit of descriptors is 1,024
    max_streams_per_connection: _Count = 1024  # concurrent calls; a client queues the others itself


class Mirror(msgspec.Struct, frozen=True, rename={"pull_from_mirror": "pull-from-mirror"}):
    """One `mirror` of a `registry` of containers-registries.conf(5)."""

    location: str
    insecure: bool = False
    pull_from_mirror: Literal["all", "digest-only", "tag-only"] = "all"


class Registry(msgspec.Struct, frozen=True, rename={"mirror_by_digest_only": "mirror-by-digest-only"}):
    """One `registry` of containers-registries.conf(5)."""

    prefix: str = ""
    location: str = ""
    insecure: bool = False
    blocked: bool = False
    mirror: list[Mirror] = []
    mirror_by_digest_only: bool = False


class RegistryConfig(
    msgspec.Struct, frozen=True, rename={"unqualified_search_registries": "unqualified-search-registries"}
):
    """The structure of containers-registries.conf(5), as image-rs embeds it."""

    registry: list[Registry] = []
    unqualified_search_registries: list[str] = []


class ProxyConfig(msgspec.Struct, frozen=True):
    """Proxies for registries; `no_proxy` is a comma-separated list of hosts and domains."""

    https_proxy: str | None = None
    http_proxy: str | None = None
    no_proxy: str | None = None

    def __repr__(self) -> str:
        shown = (
            f"{name}={without_password(value or '')!r}"
            for name, value in msgspec.structs.asdict(self).items()
        )
        return f"ProxyConfig({', '.join(shown)})"


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of `config.json`. The first block is image-rs's, with the same meanings; the second is ours."""

    work_dir: str = DEFAULT_WORK_DIR
    default_snapshot: str = "overlay"
    max_concurrent_layer_downloads_per_image: _Count = 3
    registry_config: RegistryConfig | None = None
    registry_configuration_uri: str | None = None
    authenticated_registry_credentials_uri: str | None = None
    image_security_policy: str | None = None
    image_security_policy_uri: str | None = None
    sigstore_config: str | None = None
    sigstore_config_uri: str | None = None
    image_pull_proxy: ProxyConfig | None = None
    extra_root_certificates: list[str] = []

    additional_stores: list[str] = []
    verify_reuse: VerifyReuse = VerifyReuse.NEVER
    allow_local_images: bool = (
        False  # let PullImage read oci:, oci-archive: and docker-archive:, as bake does
    )
    bundle_roots: list[str] = []
    socket_group: str = ""  # name or number of the group that may use the unix socket; empty: only the owner
    limits: Limits = Limits()


def load_configuration(path: str | None, work_dir: str | None) -> tuple[Configuration, list[str]]:
    """Read the configuration file; return the configuration and warnings about it.

    Args:
        path: the file; None for `config.json` in the work directory, if that exists.
        work_dir: overrides the file's work_dir; None to use the file's.

    Raises:
        InvalidConfiguration: the file cannot be read, is not JSON, or has an invalid value.
    """
    source = path or os.path.join(work_dir or DEFAULT_WORK_DIR, FILE_NAME)
    try:
        with open(source, "rb") as file:
            text = file.read()
    except FileNotFoundError:
        if path is not None:
            raise InvalidConfiguration(path, "", "the file does not exist") from None
        text = b"{}"
    except OSError as error:
        raise InvalidConfiguration(source, "", error.strerror or str(error)) from None
    try:
        configuration = msgspec.json.decode(text, type=Configuration)
        unknown = _unknown_keys(msgspec.json.decode(text), Configuration, "")
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at ")
        raise InvalidConfiguration(source, place.strip("`"), problem) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidConfiguration(source, "", f"it is not JSON ({error})") from None
    if rb"\u0000" in text:
        raise InvalidConfiguration(
            source, "", "it has a NUL character in a string; paths and names cannot have any"
        )
    _refuse_relative_paths(configuration, source)
    _refuse_unsupported(configuration, source)
    if work_dir is not None:
        configuration = msgspec.structs.replace(configuration, work_dir=work_dir)
    unused = _unused_keys(configuration)
    return configuration, [
        *(f"{source}: unknown key {key} is ignored" for key in unknown),
        *(f"{source}: {key} is not used yet" for key in unused),
    ]


def _refuse_relative_paths(configuration: Configuration, source: str) -> None:
    """Refuse relative paths: their meaning would depend on the directory in which the daemon was started.

    Raises:
        InvalidConfiguration: a path is relative.
    """
    named = {
        "work_dir": [configuration.work_dir],
        "bundle_roots": configuration.bundle_roots,
        "additional_stores": configuration.additional_stores,
    }
    for key, paths in named.items():
        for path in paths:
            if not path.startswith("/"):
                raise InvalidConfiguration(source, key, f"{path!r} is not an absolute path")


def _unused_keys(configuration: Configuration) -> list[str]:
    """The keys that are known and set, but have no effect."""
    unused = [key for key in ("sigstore_config", "sigstore_config_uri") if getattr(configuration, key)]
    registries = configuration.registry_config
    if registries is not None and set(registries.unqualified_search_registries) - {"docker.io"}:
        unused.append(
            "registry_config.unqualified-search-registries"
        )  # short names always refer to Docker Hub
    return unused


class _Requirement(msgspec.Struct, frozen=True):
    type: str


class _Policy(msgspec.Struct, frozen=True):
    """The parts of containers-policy.json(5) that say what it requires."""

    default: list[_Requirement]
    transports: dict[str, dict[str, list[_Requirement]]] = {}


def _refuse_unsupported(configuration: Configuration, source: str) -> None:
    """Refuse settings that cannot be honoured. A policy that is configured but not enforced is worse than none.

    Raises:
        InvalidConfiguration: the policy requires signatures, or the snapshotter is not overlay.
    """
    if configuration.default_snapshot != "overlay":
        problem = f"unknown snapshotter {configuration.default_snapshot!r}; the only one is overlay"
        raise InvalidConfiguration(source, "default_snapshot", problem)
    uri = configuration.image_security_policy_uri
    policy = configuration.image_security_policy
    if policy is None and uri:
        if not uri.startswith("file:///"):
            raise InvalidConfiguration(source, "image_security_policy_uri", f"{uri!r} is not a file:///path")
        try:
            with open(uri.removeprefix("file://"), encoding="utf-8") as file:
                policy = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidConfiguration(source, "image_security_policy_uri", str(error)) from None
    if policy is None:
        return
    try:
        demanded = msgspec.json.decode(policy, type=_Policy)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidConfiguration(
            source, "image_security_policy", f"it is not a policy.json ({error})"
        ) from None
    scopes = [scope for transport in demanded.transports.values() for scope in transport.values()]
    types = {requirement.type for scope in (demanded.default, *scopes) for requirement in scope}
    if types - {"insecureAcceptAnything"}:
        problem = f"{', '.join(sorted(types - {'insecureAcceptAnything'}))} cannot be enforced yet"
        raise InvalidConfiguration(source, "image_security_policy", problem)


def _unknown_keys(value: Any, struct: type[msgspec.Struct], place: str) -> list[str]:
    known = {field.encode_name: field.type for field in msgspec.structs.fields(struct)}
    unknown: list[str] = []
    for key, inner in value.items():
        if key not in known:
            unknown.append(f"{place}{key}")
        elif (nested := _struct_in(known[key])) is None:
            continue
        elif isinstance(inner, dict):
            unknown += _unknown_keys(inner, nested, f"{place}{key}.")
        elif isinstance(inner, list):
            for number, one in enumerate(inner):
                unknown += _unknown_keys(one, nested, f"{place}{key}[{number}].")
    return unknown


def _struct_in(annotation: Any) -> type[msgspec.Struct] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next(
        (one for one in candidates if isinstance(one, type) and issubclass(one, msgspec.Struct)), None
    )
