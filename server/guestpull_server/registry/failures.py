"""Describes failed requests, and tells whether a retry can succeed."""

from __future__ import annotations

import ssl

import urllib3

from guestpull_server.registry.deadlines import TooSlow


def is_final(error: Exception) -> bool:
    """Whether a retry would fail in the same way, as for an untrusted certificate."""
    return _refused_certificate(error) is not None


def plain(error: Exception) -> str:
    """Describe why a request failed."""
    refused = _refused_certificate(error)
    if refused is not None:
        return (
            f"TLS: certificate verify failed: {refused.verify_message}; "
            "add its authority to extra_root_certificates in the configuration if you trust it"
        )
    match error:
        case TooSlow():
            return str(error)
        case urllib3.exceptions.NameResolutionError():
            return "host name cannot be resolved"
        case urllib3.exceptions.NewConnectionError():
            return str(error).rpartition(": ")[2].lower()
        case urllib3.exceptions.ConnectTimeoutError():
            return "connection timed out"
        case urllib3.exceptions.SSLError():
            return f"TLS: {error}"
        case urllib3.exceptions.TimeoutError() | TimeoutError():
            return "read timed out"
        case urllib3.exceptions.ProtocolError():
            return "connection broken"
        case urllib3.exceptions.InvalidHeader():
            return "contradictory headers"
        case urllib3.exceptions.ProxyError():
            return f"proxy error: {_of_proxy(error.original_error)}"
        case _:
            # the message of an unknown error can contain secrets
            return type(error).__name__


def _of_proxy(error: Exception) -> str:
    # http.client raises an OSError without errno if the proxy refuses a tunnel
    is_refusal = isinstance(error, OSError) and error.errno is None and not isinstance(error, TimeoutError)
    return str(error)[:200] if is_refusal else plain(error)


def _refused_certificate(error: Exception) -> ssl.SSLCertVerificationError | None:
    reason = error.args[0] if isinstance(error, urllib3.exceptions.SSLError) and error.args else None
    return reason if isinstance(reason, ssl.SSLCertVerificationError) else None
