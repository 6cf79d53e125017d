"""The place of the interactive login: discovery, keys, and the pages a browser visits.

Signing in with a browser is not offered yet; until it is, the authorize route says so and what to use instead. The
page that shows a code for copying needs nothing but the code and is complete.
"""

from __future__ import annotations

import html
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from relay.api.errors import ApiError
from relay.auth.scopes import OPENID_SCOPES, VIEW_IDENTITY_SET
from relay.keys import ID_TOKEN_ALGORITHM
from relay.services import services_of

router = APIRouter(tags=["Auth"])

_NO_LOGIN = (
    "This relay does not offer sign-in with a browser yet. Use a client identity: ask the relay's operator for "
    "`towpath-relay client add`, then set GLOBUS_CLI_CLIENT_ID and GLOBUS_CLI_CLIENT_SECRET."
)
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_MAX_CODE = 2000


@router.get("/.well-known/openid-configuration")
async def discovery(request: Request) -> dict[str, Any]:
    """OpenID Connect Discovery 1.0."""
    origin = services_of(request).settings.public_url
    return {
        "issuer": origin,
        "authorization_endpoint": f"{origin}/v2/oauth2/authorize",
        "token_endpoint": f"{origin}/v2/oauth2/token",
        "userinfo_endpoint": f"{origin}/v2/oauth2/userinfo",
        "revocation_endpoint": f"{origin}/v2/oauth2/token/revoke",
        "introspection_endpoint": f"{origin}/v2/oauth2/token/introspect",
        "jwks_uri": f"{origin}/jwk.json",
        "scopes_supported": [*sorted(OPENID_SCOPES), VIEW_IDENTITY_SET],
        "response_types_supported": ["code"],
        "grant_types_supported": ["client_credentials", "refresh_token"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": [ID_TOKEN_ALGORITHM],
        "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post"],
        "claims_supported": [
            "iss",
            "sub",
            "aud",
            "iat",
            "exp",
            "name",
            "email",
            "preferred_username",
            "identity_provider",
            "identity_provider_display_name",
            "organization",
            "last_authentication",
        ],
    }


@router.get("/jwk.json")
async def keys(request: Request) -> JSONResponse:
    """The public keys of id_tokens (RFC 7517), the one in use first."""
    return JSONResponse(services_of(request).keys.jwk_set)


@router.get("/v2/oauth2/authorize", response_model=None)
async def authorize(request: Request) -> Response:
    """Where the interactive login begins."""
    if "text/html" in request.headers.get("accept", ""):
        return _page("Sign-in", f"<p>{html.escape(_NO_LOGIN)}</p>", status=501)
    raise ApiError(501, "unsupported_response_type", _NO_LOGIN)


@router.post("/v2/api/clients")
async def register_client() -> None:
    """Where a native application registers itself before the interactive login."""
    raise ApiError(501, "NOT_IMPLEMENTED", _NO_LOGIN)


@router.get("/v2/web/auth-code", response_class=HTMLResponse)
async def show_code(code: str = "", error: str = "") -> HTMLResponse:
    """The page from which people copy an authorization code into a terminal."""
    if error or not 1 <= len(code) <= _MAX_CODE:
        return _page("Sign-in", "<p>There is no code here; start the sign-in again.</p>", status=400)
    shown = f"<p>Copy this code into your terminal:</p><p><code>{html.escape(code)}</code></p>"
    return _page("Authorization code", shown)


def _page(title: str, body: str, status: int = 200) -> HTMLResponse:
    """``body`` is HTML; whatever came from outside must be escaped already."""
    text = (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>body{{font:1.1rem/1.5 system-ui;margin:4rem auto;max-width:40rem;"
        "padding:0 1rem}code{font-size:1.3rem;user-select:all;overflow-wrap:anywhere}</style>"
        f"<main><h1>{html.escape(title)}</h1>{body}</main></html>"
    )
    return HTMLResponse(text, status_code=status, headers=_PAGE_HEADERS)
