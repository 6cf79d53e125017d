"""What people are told when a certificate is not the relay's: most often a proxy opens encrypted connections."""

from __future__ import annotations

import ssl

CODE = "INTERCEPTED"


def certificate_sentence(host: str, error: ssl.SSLCertVerificationError) -> str:
    """A sentence for the agent's owner."""
    return (
        f"The certificate shown for the relay {host} is not the expected one: {error.verify_message}. If a proxy on "
        "this network opens encrypted connections, ask its operator to let those to the relay through untouched."
    )
