"""The configuration: image-rs's `ImageConfig` keys, ours beside them, and every bound with its unit.

`<work_dir>/config.json`, or the file that `--config` names. All keys are optional. An unknown key is a
warning (image-rs may know more keys tomorrow), a wrong type is an error that names its place.
"""

from __future__ import annotations

import os
from enum import Enum
from typing import Annotated, Any, Literal

import msgspec

from guestpull_server.errors import InvalidConfiguration
from guestpull_server.models import GiB, KiB, MiB, without_password

DEFAULT_WORK_DIR = "/run/kata-containers/image"
MIN_DESCRIPTORS = 64  # open files; a daemon at rest has 24, and gRPC aborts the process where it gets none
FILE_NAME = "config.json"


A_YEAR = 366 * 24 * 3600  # no clock of the operating system's overflows with a few of them
_Count = Annotated[int, msgspec.Meta(ge=1)]
_Amount = Annotated[int, msgspec.Meta(ge=0)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=A_YEAR)]
_WholeSeconds = Annotated[int, msgspec.Meta(ge=1, le=A_YEAR)]
_Delay = Annotated[float, msgspec.Meta(ge=0, le=A_YEAR)]


class VerifyReuse(Enum):
    """When a layer that is there already is proved to be its image's before it is mounted."""

    NEVER = "never"
    MOUNT = "mount"
    """Once as long as the daemon runs. What root alters within a layer afterwards goes unnoticed till the next."""
    ALWAYS = "always"


class LayerNames(Enum):
    """How directories in layers/ are named: by digest, or by a running number as image-rs of 2025 on does."""

    DIGEST = "digest"
    INDEX = "index"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on what an image, a registry or a caller may cost us.

    A violation raises LimitExceeded, which names the field. Sizes are bytes, times are seconds.
    """

    # -- what a registry may send
    max_manifest_bytes: _Count = 4 * MiB  # the distribution specification asks registries for at least this
    max_config_bytes: _Count = 8 * MiB  # image configs with long histories stay below one
    max_layers: _Count = 500  # what overlayfs stacks (OVL_MAX_STACK)

    # -- what one layer may unpack to
    max_layer_bytes: _Count = 64 * GiB  # file contents; the largest ML images have layers of some 20 GiB
    max_layer_entries: _Count = 10_000_000  # enough for any image, small enough to end a bomb
    max_compression_ratio: _Count = 2000  # deflate cannot exceed 1032; zstd of an all-zero disk can, and may
    max_implied_directories: _Count = 100_000  # each is remembered; real layers have few or none
    max_implied_path_bytes: _Count = 8 * MiB  # their paths together
    max_path_bytes: _Count = 4096  # PATH_MAX
    max_path_depth: _Count = 256  # components; deep enough for node_modules, shallow enough to walk
    max_header_bytes: _Count = 1 * MiB  # one pax or GNU extension header; as Go's archive/tar
    max_xattr_bytes: _Count = 64 * KiB  # one value: XATTR_SIZE_MAX
    max_zstd_window_bytes: _Count = 128 * MiB  # the zstd command's own default for decoding

    # -- what making one bundle may cost
    max_config_strings: _Count = (
        100_000  # by their quotation marks; shell commands of long histories have many
    )
    max_volumes: _Count = 256  # each may be a mount in the container; real images have a handful
    volume_bytes: _Count = 1 * GiB  # size of a volume's tmpfs; it is memory, and unbounded it is half of all
    max_lookup_steps: _Count = 100_000  # path components; 256 volumes 100 directories deep take 25,600
    max_read_bytes: _Count = 4 * MiB  # of /etc/passwd, and of /etc/group; some 50,000 accounts
    max_groups: _Count = 65_536  # of the process; NGROUPS_MAX

    # -- patience with a registry
    connect_timeout: _Seconds = 10.0
    read_timeout: _Seconds = 30.0  # without a single byte
    min_bytes_per_second: _Amount = 1024  # averaged over read_timeout; slower is a stalled connection
    max_attempts: _Count = 6  # of one request, the first included
    max_retry_delay: _Delay = 30.0  # also the longest Retry-After that is honoured
    max_redirects: _Amount = 5

    # -- what is kept for a while
    # layers of a pull that failed, for the next try; kubelet waits at most 5 minutes between two
    unused_layer_seconds: _WholeSeconds = 900

    # -- what callers may ask at once
    max_concurrent_pulls: _Count = 64  # that ask one registry; and as many that work on this machine
    max_queued_pulls: _Count = 320  # under way or waiting; beyond it RESOURCE_EXHAUSTED
    max_queued_pulls_per_registry: _Count = 256  # likewise; one that does not answer leaves room for others
    # of one pull, waiting included; a caller's deadline may be shorter
    max_pull_seconds: _WholeSeconds = 3600
    # downloaded and unpacked at once, over all pulls; a worker takes 28 MiB. One registry gets half at most
    max_concurrent_layers: _Count = 16
    max_concurrent_lists: _Count = 16  # threads; a list takes milliseconds
    max_concurrent_deletions: _Count = 16  # threads that remove, release or collect, and may wait for a disk
    max_request_bytes: _Count = 1 * MiB  # one message; image names and credentials are far smaller
    max_connections: _Count = 512  # each takes a descriptor, of which 1,024 is the usual number
    max_streams_per_connection: _Count = 1024  # calls at once; a client keeps those beyond it waiting itself


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
    """What `config.json` may say. The first block is image-rs's, with its meanings; the second is ours."""

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
    allow_local_images: bool = False  # PullImage of oci:, oci-archive:, docker-archive:, as bake takes them
    bundle_roots: list[str] = []
    socket_group: str = (
        ""  # whose members may call over the unix socket, by name or number; empty: the owner alone
    )
    limits: Limits = Limits()


def load_configuration(path: str | None, work_dir: str | None) -> tuple[Configuration, list[str]]:
    """Read the configuration file; returns it with the warnings that it deserves.

    Args:
        path: the file; None: `config.json` in the work directory, if there is one.
        work_dir: the work directory if the caller named one; it wins over the file's.

    Raises:
        InvalidConfiguration: the file cannot be read, is no JSON, or a value has the wrong type.
    """
    source = path or os.path.join(work_dir or DEFAULT_WORK_DIR, FILE_NAME)
    try:
        with open(source, "rb") as file:
            text = file.read()
    except FileNotFoundError:
        if path is not None:
            raise InvalidConfiguration(path, "", "there is no such file") from None
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
        raise InvalidConfiguration(source, "", f"it is no JSON ({error})") from None
    if rb"\u0000" in text:
        raise InvalidConfiguration(
            source, "", "it has a NUL character in a text, which no path and no name can"
        )
    _refuse_relative_paths(configuration, source)
    _refuse_what_is_not_done(configuration, source)
    if work_dir is not None:
        configuration = msgspec.structs.replace(configuration, work_dir=work_dir)
    unused = _unused_keys(configuration)
    return configuration, [
        *(f"{source}: unknown key {key} is ignored" for key in unknown),
        *(f"{source}: {key} is not used yet" for key in unused),
    ]


def _refuse_relative_paths(configuration: Configuration, source: str) -> None:
    """Whoever starts the daemon elsewhere would mean other directories by them.

    Raises:
        InvalidConfiguration: there are some.
    """
    named = {
        "work_dir": [configuration.work_dir],
        "bundle_roots": configuration.bundle_roots,
        "additional_stores": configuration.additional_stores,
    }
    for key, paths in named.items():
        for path in paths:
            if not path.startswith("/"):
                raise InvalidConfiguration(source, key, f"{path!r} is no absolute path")


def _unused_keys(configuration: Configuration) -> list[str]:
    """Keys that are known and set, but change nothing."""
    unused = [key for key in ("sigstore_config", "sigstore_config_uri") if getattr(configuration, key)]
    registries = configuration.registry_config
    if registries is not None and set(registries.unqualified_search_registries) - {"docker.io"}:
        unused.append("registry_config.unqualified-search-registries")  # short names are Docker Hub's
    return unused


class _Requirement(msgspec.Struct, frozen=True):
    type: str


class _Policy(msgspec.Struct, frozen=True):
    """containers-policy.json(5), as far as it must be read to see what it demands."""

    default: list[_Requirement]
    transports: dict[str, dict[str, list[_Requirement]]] = {}


def _refuse_what_is_not_done(configuration: Configuration, source: str) -> None:
    """Fail closed: a policy that is configured, and not enforced, would be worse than none.

    Raises:
        InvalidConfiguration: signatures are demanded, or another snapshotter than overlay.
    """
    if configuration.default_snapshot != "overlay":
        problem = f"there is no snapshotter {configuration.default_snapshot!r}, only overlay"
        raise InvalidConfiguration(source, "default_snapshot", problem)
    uri = configuration.image_security_policy_uri
    policy = configuration.image_security_policy
    if policy is None and uri:
        if not uri.startswith("file:///"):
            raise InvalidConfiguration(source, "image_security_policy_uri", f"{uri!r} is no file:///path")
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
            source, "image_security_policy", f"it is no policy.json ({error})"
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
