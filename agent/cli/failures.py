"""Turning what goes wrong between a command and its relay into one sentence with the next step."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from agent.cli.output import CommandFailed, sentence
from agent.exit_codes import ExitCode
from protocol.interception import PORTAL, is_about_time, time_sentence

if TYPE_CHECKING:
    from globus_sdk import AuthAPIError, GlobusAPIError

    from agent.cli.profile import Profile

_OFFLINE_CODES = ("GCDisconnected", "GC_NOT_CONNECTED")
_AUTHENTICATION_CODE = "ClientError.AuthenticationFailed"


@contextmanager
def explained(profile: Profile | None = None) -> Iterator[None]:
    """Raise `CommandFailed` with a sentence for every failure of a call to the relay inside."""
    from globus_sdk import AuthAPIError, GlobusAPIError, GlobusError, NetworkError

    try:
        yield
    except AuthAPIError as error:
        raise CommandFailed(_auth_sentence(error, profile)) from error
    except GlobusAPIError as error:
        raise CommandFailed(api_sentence(error)) from error
    except NetworkError as error:
        relay, ca_file = (profile.relay_url, profile.ca_file) if profile else ("the relay", None)
        raise CommandFailed(network_sentence(error.underlying_exception, relay, ca_file)) from error
    except GlobusError as error:
        raise CommandFailed(f"The relay answered in a way that cannot be understood: {error}") from error


def api_sentence(error: GlobusAPIError) -> str:
    """What the relay refused, in its own words where they help, with the next step where one is known."""
    code = str(error.code or "")
    message = (error.message or "").strip() or f"The relay answered {error.http_status}."
    if code == _AUTHENTICATION_CODE or error.http_status == 401:
        return "The relay does not accept these credentials any more; run `towpath login` again."
    if any(word in code for word in _OFFLINE_CODES):
        start = "start it on its machine (`towpath start`) and try again."
        return message if "setup key" in message else f"{message.partition(';')[0].rstrip('.')}; {start}"
    if not code or code == "Error":
        return sentence(message)
    if message.endswith(")"):
        # What an agent refused already ends with the endpoint and the code of the trouble.
        return message
    return f"{sentence(message)} ({code})"


def _auth_sentence(error: AuthAPIError, profile: Profile | None) -> str:
    relay = profile.relay_url if profile else "the relay"
    if error.http_status in (400, 401, 403):
        if profile is not None and profile.tokens is not None:
            return f"Your sign-in to {relay} has ended; run `towpath login` again."
        return (
            f"{relay} does not accept this client id and secret; check both (`towpath-relay client add` makes new "
            f"ones) and run `towpath login` again."
        )
    return f"{relay} could not sign this client in: {error.message or error.http_status}"


def network_sentence(error: BaseException | None, relay: str, ca_file: str | None) -> str:
    """Why the relay cannot be reached: name, refusal, certificate or silence, told apart by exception class.

    ``relay`` is its address, ``ca_file`` the certificate authority that was trusted alone.
    """
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _certificate_sentence(relay, cause, ca_file)
        if isinstance(cause, ssl.SSLError):
            return f"{relay} does not speak TLS as expected ({cause.reason or cause}); check the address and the port."
    names = {type(cause).__name__ for cause in causes}
    unknown = "NameResolutionError" in names or "gaierror" in names
    refused = any(isinstance(cause, ConnectionRefusedError) for cause in causes)
    late = "ConnectTimeout" in names or "ReadTimeout" in names or any(isinstance(c, TimeoutError) for c in causes)
    last = causes[-1] if causes else error
    proxy = _proxy_on_the_way(relay)
    if proxy:
        # Whatever was not reached then was the proxy.
        told = "its name is not known to this machine" if unknown else "nothing answers there" if refused else ""
        told = told or ("it did not answer in time" if late else f"it does not let this through ({last})")
        return (
            f"The way to {relay} leads through the proxy {proxy}, and {told}. Correct HTTPS_PROXY (a proxy that wants "
            "a name has it written as http://USER:PASSWORD@HOST:PORT), or name the relay's host in NO_PROXY."
        )
    if unknown:
        return f"The name in {relay} is not known to this machine; check its spelling and the network connection."
    if refused:
        return f"Nothing answers at {relay}; check the address, or ask the relay's operator whether it is running."
    if late:
        return f"{relay} did not answer in time; check the network connection and try again."
    return f"{relay} cannot be reached ({last}); check the network connection and try again."


def _proxy_on_the_way(relay: str) -> str:
    """The proxy that the environment (or the system) names for a relay, without a password in it; empty for none."""
    from requests.utils import get_environ_proxies, select_proxy

    address = select_proxy(relay, get_environ_proxies(relay)) or ""
    return address.rpartition("@")[2]


def _certificate_sentence(relay: str, error: ssl.SSLCertVerificationError, ca_file: str | None) -> str:
    if is_about_time(error):
        return time_sentence(relay, error)
    reason = error.verify_message or "certificate not trusted"
    if ca_file:
        return (
            f"The certificate of {relay} does not fit {ca_file} ({reason}). {PORTAL} If it stays so, ask the relay's "
            "operator for the CA file."
        )
    return (
        f"The certificate of {relay} is not trusted ({reason}); get the relay's CA certificate from its operator and "
        f"name it with `--ca-file` or TOWPATH_CA_FILE. {PORTAL}"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and everything behind it: causes, contexts, and what requests and urllib3 carry as arguments."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting and len(seen) < 64:
        current = waiting.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [current.__cause__, current.__context__]
        waiting += [argument for argument in current.args if isinstance(argument, BaseException)]
        reason = getattr(current, "reason", None)
        if isinstance(reason, BaseException):
            waiting.append(reason)


def exit_with(code: ExitCode) -> None:
    """End the running command with an exit code that is not an error message."""
    if code is not ExitCode.DONE:
        import click

        click.get_current_context().exit(int(code))
