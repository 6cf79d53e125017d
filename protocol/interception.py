"""What people are told when a certificate is not the relay's: most often somebody on the way answers in its place."""

from __future__ import annotations

import ssl

CODE = "INTERCEPTED"
# What OpenSSL finds wrong with a certificate (X509_V_ERR_…, openssl-verification-options(1)): not valid yet, no longer,
# for another name or address.
EARLY, LATE, NAMES = 9, 10, (62, 64)
PORTAL = "On a network that asks you to sign in first (a hotel, a train), do that in a browser."
PROXY = (
    "If a proxy or firewall on this network opens encrypted connections, ask its operator to let those to the relay "
    "through untouched."
)


def certificate_error(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """The certificate that was refused, where that is behind an error of a library."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error


def certificate_sentence(host: str, error: ssl.SSLCertVerificationError) -> str:
    """A sentence for the agent's owner."""
    if is_about_time(error):
        return time_sentence(host, error)
    shown = f"The certificate shown for the relay {host} is not the expected one: {error.verify_message}."
    return f"{shown} {PORTAL} {PROXY}"


def is_about_time(error: ssl.SSLCertVerificationError) -> bool:
    """Whether a certificate is right but for the time."""
    return getattr(error, "verify_code", 0) in (EARLY, LATE)


def time_sentence(relay: str, error: ssl.SSLCertVerificationError) -> str:
    """A sentence about a certificate that is valid at other times."""
    return (
        f"The certificate of the relay {relay} does not hold now: {error.verify_message}. Look whether this machine's "
        "clock is right; if it is, the relay's operator has to renew the certificate."
    )
