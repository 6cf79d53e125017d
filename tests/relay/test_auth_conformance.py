"""Auth documents compared with the SDK's own examples: the same keys, values of the same types."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from relay.auth.scopes import MANAGE_PROJECTS, TRANSFER_ALL, VIEW_CONSENTS
from tests.relay.sign_in_world import Application, Person, add_person
from tests.relay.test_oauth_grants import CLI_TEMPLATE, DEPENDENT_GRANT, custom_scope
from tests.relay.test_transfer_conformance import compare

if TYPE_CHECKING:
    from tests.relay.relay_world import RelayWorld


def example(module: str, case: str = "default") -> Any:
    """The document the SDK's tests use for one method of the Auth client."""
    responses = importlib.import_module(f"globus_sdk.testing.data.auth.{module}").RESPONSES
    return responses.lookup(case).json


async def signed_in(world: RelayWorld, scope: str) -> tuple[dict[str, Any], dict[str, str], str]:
    ada = await add_person(world, "ada")
    person, application = Person(world), Application(scope=scope)
    await person.arrive(ada)
    document = (await application.redeem(world, await application.code(person))).json()
    return document, {"Authorization": f"Bearer {document['access_token']}"}, ada.id


async def test_token_documents(world: RelayWorld) -> None:
    document, _, _ = await signed_in(world, f"openid {TRANSFER_ALL}")
    compare(example("oauth2_exchange_code_for_tokens", "openid"), document)
    (transfer,) = document["other_tokens"]
    theirs = {k: v for k, v in example("oauth2_exchange_code_for_tokens").items() if k not in ("state", "other_tokens")}
    compare(theirs, transfer)
    client = await world.client()
    form = {"grant_type": "client_credentials", "scope": f"openid {TRANSFER_ALL}"}
    compare(
        {k: v for k, v in example("oauth2_client_credentials_tokens").items() if k != "other_tokens"},
        (await world.http.post("/v2/oauth2/token", data=form, auth=client)).json(),
    )
    wrong = {"grant_type": "authorization_code", "code": "x"}
    answer = await world.http.post("/v2/oauth2/token", data=wrong, auth=client)
    assert answer.status_code == 401
    compare(example("oauth2_exchange_code_for_tokens", "invalid_grant"), answer.json())


async def test_dependent_tokens(world: RelayWorld) -> None:
    service_id, secret, scope = await custom_scope(world, TRANSFER_ALL)
    document, _, _ = await signed_in(world, scope)
    form = {"grant_type": DEPENDENT_GRANT, "token": document["access_token"]}
    answer = await world.http.post("/v2/oauth2/token", data=form, auth=(service_id, secret))
    compare(example("oauth2_get_dependent_tokens", "groups"), answer.json())


async def test_introspection_and_revocation(world: RelayWorld) -> None:
    client = await world.client()
    form = {"grant_type": "client_credentials", "scope": "openid profile email"}
    token = (await world.http.post("/v2/oauth2/token", data=form, auth=client)).json()["access_token"]
    asked = {"token": token, "include": "session_info,identity_set,identity_set_detail"}
    answer = await world.http.post("/v2/oauth2/token/introspect", data=asked, auth=client)
    compare(example("oauth2_token_introspect"), answer.json())
    answer = await world.http.post("/v2/oauth2/token/revoke", data={"token": token}, auth=client)
    compare(example("oauth2_revoke_token"), answer.json())


async def test_identities_providers_and_consents(world: RelayWorld) -> None:
    _, bearer, ada = await signed_in(world, f"openid {VIEW_CONSENTS} {MANAGE_PROJECTS}")
    found = (await world.http.get("/v2/api/identities", params={"ids": ada}, headers=bearer)).json()
    compare(example("get_identities"), found)
    both = {"ids": ada, "include": "identity_provider"}
    compare(
        example("get_identities", "sirosen"),
        (await world.http.get("/v2/api/identities", params=both, headers=bearer)).json(),
    )
    domain = {"domains": world.settings.user_domain}
    compare(
        example("get_identity_providers"),
        (await world.http.get("/v2/api/identity_providers", params=domain, headers=bearer)).json(),
    )
    consents = await world.http.get(f"/v2/api/identities/{ada}/consents?all=true", headers=bearer)
    compare(example("get_consents"), consents.json())


async def test_refusals(world: RelayWorld) -> None:
    answer = await world.http.get("/v2/oauth2/userinfo")
    assert answer.status_code == 401
    compare(example("userinfo", "unauthorized"), answer.json())
    _, bearer, _ = await signed_in(world, VIEW_CONSENTS)
    answer = await world.http.get("/v2/oauth2/userinfo", headers=bearer)
    assert answer.status_code == 403
    compare(example("userinfo", "forbidden"), answer.json())


async def test_a_copy_of_a_native_application(world: RelayWorld) -> None:
    body = {"client": {"template_id": CLI_TEMPLATE, "name": "Globus CLI"}}
    ours = (await world.http.post("/v2/api/clients", json=body)).json()
    theirs = example("create_native_app_instance")
    # The SDK's example nests what the real service, and the Globus CLI, have at top level.
    compare(theirs["client"].get("client", theirs["client"]), ours["client"])
