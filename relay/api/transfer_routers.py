"""All routers of the Transfer API, for `relay.server` to include."""

from __future__ import annotations

from relay.api import (
    transfer_access,
    transfer_bookmarks,
    transfer_endpoints,
    transfer_managers,
    transfer_operations,
    transfer_roles,
    transfer_submission,
    transfer_tasks,
)

ROUTERS = (
    transfer_endpoints.router,
    transfer_roles.router,
    transfer_access.router,
    transfer_operations.router,
    transfer_submission.router,
    transfer_tasks.router,
    transfer_bookmarks.router,
    transfer_managers.router,
)
