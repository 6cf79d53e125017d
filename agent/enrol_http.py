"""The two requests of set-up, with httpx. Answers are bounded and checked; errors become sentences."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

import httpx
import msgspec

from protocol.control import EnrolAnswer, EnrolRequest, decode_untrusted, encode
from protocol.errors import ProtocolError, TowpathError
from protocol.interception import certificate_error

TIMEOUT = 20.0
MAX_ANSWER = 256 * 1024


class RelayUnreachable(TowpathError):
    """The relay did not answer, or not as a relay does."""

    disposition = "retry"
    default_code = "CONNECT_FAILED"


class SetupRefused(TowpathError):
    """The relay said no; its own sentence is passed on."""

    default_code = "SETUP_REFUSED"


@dataclass(frozen=True)
class RelayTrust:
    """How to check the relay from now on. ``relay_id`` is None where nothing has been asked yet."""

    context: ssl.SSLContext
    ca_pem: str | None
    relay_id: str | None


class _About(msgspec.Struct):
    relay_id: str
    ca_certificate: str | None = None


class _Refusal(msgspec.Struct):
    code: str = ""
    message: str = ""


def fetch_authority(relay_url: str) -> tuple[str, str]:
    """The relay's id and CA certificate (PEM), over a connection that trusts *nobody*: for comparing only.

    Raises `RelayUnreachable`.
    """
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    status, body = _exchange(relay_url, context, "GET", "/towpath/v1/relay", None)
    if status != 200:
        raise RelayUnreachable(f"{relay_url} does not answer like a Towpath relay (status {status}).")
    try:
        about = decode_untrusted(body, _About)
    except ProtocolError as error:
        raise RelayUnreachable(f"{relay_url} does not answer like a Towpath relay.") from error
    if about.ca_certificate is None:
        raise RelayUnreachable(
            f"{relay_url} shows no certificate authority although the setup key names one; ask for a new setup key."
        )
    return about.relay_id, about.ca_certificate


def redeem(relay_url: str, trust: RelayTrust, request: EnrolRequest) -> EnrolAnswer:
    """Redeem a setup key over a verified connection. Raises `RelayUnreachable` or `SetupRefused`."""
    status, body = _exchange(relay_url, trust.context, "POST", "/towpath/v1/enrol", encode(request))
    if status in (200, 201):
        try:
            return decode_untrusted(body, EnrolAnswer)
        except ProtocolError as error:
            raise RelayUnreachable(f"{relay_url} gave an answer that cannot be read.") from error
    try:
        refusal = decode_untrusted(body, _Refusal)
    except ProtocolError:
        refusal = _Refusal()
    if status >= 500 or not refusal.message:
        raise RelayUnreachable(f"{relay_url} answered with status {status}; try again later.")
    message = "".join(c if c.isprintable() else " " for c in refusal.message[:500])
    raise SetupRefused(f"The relay refused: {message}", code=refusal.code[:64] or None, who="you")


def _exchange(relay_url: str, context: ssl.SSLContext, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
    headers = {"accept": "application/json", "user-agent": "towpath-agent"}
    if body is not None:
        headers["content-type"] = "application/json"
    try:
        # Redirects are not followed: the key goes to the origin it names, or nowhere.
        with (
            httpx.Client(verify=context, timeout=TIMEOUT, follow_redirects=False) as client,
            client.stream(method, relay_url + path, content=body, headers=headers) as response,
        ):
            received = bytearray()
            for chunk in response.iter_bytes():
                received += chunk
                if len(received) > MAX_ANSWER:
                    raise RelayUnreachable(f"{relay_url} answered with more than a relay would.")
            return response.status_code, bytes(received)
    except httpx.HTTPError as error:
        raise RelayUnreachable(f"The relay {relay_url} cannot be reached: {_reason(error)}.", who="you") from error


def _reason(error: httpx.HTTPError) -> str:
    refused = certificate_error(error)
    if refused is not None:
        return f"its certificate cannot be trusted ({refused.verify_message})"
    if isinstance(error, httpx.TimeoutException):
        return f"no answer within {TIMEOUT:.0f} seconds"
    return str(error) or type(error).__name__
