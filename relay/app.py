"""The relay's one HTTP application: every service on one origin, as `relay.server` and the tests use it."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware

from relay.api import (
    auth_applications,
    auth_identities,
    auth_login,
    auth_scopes,
    auth_tokens,
    errors,
    quota,
    relay_info,
    statistics,
    token_info,
    updates,
)
from relay.api.errors import service_of
from relay.api.frame import Frame
from relay.audit.recorder import AuditMiddleware
from relay.pages import account, authorize, device, one_time, passkeys, render, sign_in, upstream
from relay.pages.developers import application, index, policy, project, scope
from relay.proxies import OriginMiddleware
from relay.services import Services

OWN = (
    auth_tokens.router,
    auth_identities.router,
    auth_login.router,
    auth_applications.router,
    auth_scopes.router,
    relay_info.router,
    quota.router,
    statistics.router,
    updates.router,
    token_info.router,
)
PAGES = (
    authorize.router,
    sign_in.router,
    account.router,
    passkeys.router,
    one_time.router,
    device.router,
    upstream.router,
    index.router,
    project.router,
    application.router,
    policy.router,
    scope.router,
)


def create_app(services: Services, routers: Iterable[APIRouter] = ()) -> FastAPI:
    """The application over these services: Auth, the relay's own routes, and ``routers``."""
    app = FastAPI(
        title=services.settings.name,
        version=metadata.version("towpath"),
        description="Globus-compatible APIs of a Towpath relay.",
        # The pages FastAPI would offer load scripts from elsewhere; the description itself is at /openapi.json.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.services = services
    offered = set()
    for router in (*OWN, *routers):
        app.include_router(router)
        offered |= {service_of(getattr(route, "path", "")) for route in router.routes}
    for router in PAGES:
        app.include_router(router)
    render.install(app)
    errors.install(app, frozenset(offered), render.not_found)
    app.add_middleware(AuditMiddleware, recorder=services.audit)
    app.add_middleware(Frame, max_body=services.settings.limits.request_body, clock=services.clock)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=services.settings.web.allowed_origins,
        allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=["Authorization", "Content-Type", "X-Globus-Client-Info"],
    )
    if proxies := services.settings.listen.front:
        app.add_middleware(OriginMiddleware, proxies=proxies)
    return app
