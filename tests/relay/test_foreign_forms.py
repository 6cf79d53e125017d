"""Forms that other sites have a signed-in browser send: none of the relay's pages takes one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import httpx
from fastapi.routing import APIRoute

from relay.app import PAGES
from tests.relay.relay_world import RelayWorld
from tests.relay.sign_in_world import Person, add_person, forms_of

EXPIRED = "That form has expired"
FOREIGN = {
    "another site": {"Origin": "https://evil.example"},
    "no site": {"Origin": "null"},
    "says the browser": {"Sec-Fetch-Site": "cross-site"},
    "a sibling": {"Sec-Fetch-Site": "same-site"},
}
# So many forms there are at least.
FEWEST = 20


def places() -> Iterator[str]:
    """Where pages take forms."""
    for route in itertools.chain.from_iterable(router.routes for router in PAGES):
        # There is no provider here to sign in with.
        if isinstance(route, APIRoute) and "POST" in route.methods and route.path != "/sign-in/with/{name}":
            yield route.path_format.format(**dict.fromkeys(route.param_convertors, "x"))


async def test_no_page_takes_a_form_of_another_site(world: RelayWorld, ada: Person) -> None:
    token = forms_of((await ada.get("/account")).text)[0].fields["form_token"]
    mallory = Person(world)
    await mallory.arrive(await add_person(world, "mallory"))
    theirs = forms_of((await mallory.get("/account")).text)[0].fields["form_token"]

    def is_refused(answer: httpx.Response) -> bool:
        return answer.status_code == 403 and EXPIRED in answer.text

    # Signing out last: no token counts any more then.
    found = sorted(places(), key="/sign-out".__eq__)
    assert len(found) >= FEWEST
    for place in found:
        # With the token from a page of the relay, and as browsers send what another site begins.
        for how, headers in FOREIGN.items():
            answer = await ada.request("POST", place, {"form_token": token}, **headers)
            assert is_refused(answer), f"{place} from {how}: {answer.status_code}"
        for other in ({}, {"form_token": ""}, {"form_token": theirs}):
            answer = await ada.request("POST", place, other)
            assert is_refused(answer), f"{place} with {other}: {answer.status_code}"
    assert "ada@" in (await ada.get("/account")).text
    # So it was not for something else that they were refused.
    own = {"form_token": token}
    taken = [place for place in found if not is_refused(await ada.request("POST", place, own))]
    assert taken == found


async def test_a_session_cookie_from_before_the_sign_in_counts_for_nothing(world: RelayWorld) -> None:
    await add_person(world, "ada")
    mallory, ada = Person(world), Person(world)
    await mallory.get("/sign-in")
    # Somebody has both cookies set in ada's browser.
    mallory.cookies["__Host-towpath-session"] = "x" * 43
    ada.cookies.update(mallory.cookies)
    await ada.sign_in()
    assert "ada@" in (await ada.get("/account")).text
    assert "ada@" not in (await mallory.get("/account")).text
