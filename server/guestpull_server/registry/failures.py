"""Why an exchange failed, in a few words; and whether another attempt can fare better."""

from __future__ import annotations

import ssl

import urllib3

from guestpull_server.registry.deadlines import TooSlow


def is_final(error: Exception) -> bool:
    """Whether the same request would fail in the same way again: a certificate stays what it is."""
    return _refused_certificate(error) is not None


def plain(error: Exception) -> str:
    """What went wrong with an exchange."""
    refused = _refused_certificate(error)
    if refused is not None:
        return (
            f"TLS: certificate verify failed: {refused.verify_message}; "
            "extra_root_certificates in the configuration names further authorities"
        )
    match error:
        case TooSlow():
            return str(error)
        case urllib3.exceptions.NameResolutionError():
            return "its name cannot be resolved"
        case urllib3.exceptions.NewConnectionError():
            return str(error).rpartition(": ")[2].lower()
        case urllib3.exceptions.ConnectTimeoutError():
            return "no connection in time"
        case urllib3.exceptions.SSLError():
            return f"TLS: {error}"
        case urllib3.exceptions.TimeoutError() | TimeoutError():
            return "it sends nothing in time"
        case urllib3.exceptions.ProtocolError():
            return "the connection broke"
        case urllib3.exceptions.InvalidHeader():
            return "it contradicts itself in a header"
        case urllib3.exceptions.ProxyError():
            return f"the proxy cannot be used: {_of_proxy(error.original_error)}"
        case _:
            # the message of an error that nobody foresaw might hold anything
            return type(error).__name__


def _of_proxy(error: Exception) -> str:
    # what http.client says of a tunnel that a proxy refused is an OSError without a number
    is_refusal = isinstance(error, OSError) and error.errno is None and not isinstance(error, TimeoutError)
    return str(error)[:200] if is_refusal else plain(error)


def _refused_certificate(error: Exception) -> ssl.SSLCertVerificationError | None:
    reason = error.args[0] if isinstance(error, urllib3.exceptions.SSLError) and error.args else None
    return reason if isinstance(reason, ssl.SSLCertVerificationError) else None
