"""The race for a path, in virtual time: what is tried when, what is given out, and that it always ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.connect import race as module
from agent.connect.race import Arrange, Dial, Race, SendOffer, ShowPorts
from tests.agent.race_course import OUTSIDE, V4, V6, Course, meeting, relayed, silent


def test_ipv6_starts_a_little_earlier() -> None:
    course = Course(Race(now=100.0, direct=[V4, V6], can_offer=False))
    course.run(silent)
    dials = [(when, action.candidate) for when, action in course.started if isinstance(action, Dial)]
    assert dials == [(0.0, V6), (pytest.approx(module.BIAS), V4)]


def test_the_first_direct_connection_is_given_at_once_and_ends_the_others() -> None:
    def world(course: Course, action: object) -> None:
        if isinstance(action, Dial) and action.candidate is V4:
            course.later(0.02, lambda: course.race.connected(course.now, action.id))

    course = Course(Race(now=100.0, direct=[V4, V6]))
    course.run(world)
    assert course.given == [(pytest.approx(module.BIAS + 0.02), course.given[0][1])]
    assert course.kinds_given() == ["direct"]
    assert course.race.dials_itself
    assert len(course.cancelled) == 1
    assert course.now - 100.0 < 1


def test_punching_beats_the_tunnel_and_every_slot_counts() -> None:
    course = Course(Race(now=100.0, direct=[]))
    course.run(relayed(tunnel=0.05, punched=0.04))
    assert not course.race.dials_itself
    assert course.kinds_given() == ["punched", "punched"]
    assert course.given[0][0] < module.TUNNEL_HOLD
    tunnel = next(key for key, kind in course.kinds.items() if kind == "tunnel")
    assert tunnel in course.cancelled


def test_the_tunnel_waits_a_moment_then_carries_and_a_better_path_still_comes() -> None:
    course = Course(Race(now=100.0, direct=[]))
    course.run(relayed(tunnel=0.05, punched=2.0))
    assert course.kinds_given() == ["tunnel", "punched", "punched"]
    assert course.given[0][0] == pytest.approx(module.TUNNEL_HOLD)


def test_the_tunnel_alone_is_given_within_a_second() -> None:
    course = Course(Race(now=100.0, direct=[V4]))
    course.run(relayed(tunnel=0.2, punched=None))
    assert course.kinds_given() == ["tunnel"]
    assert course.given[0][0] < 1.0
    assert course.race.rounds == module.MAX_ROUNDS


def test_where_nothing_else_is_to_be_expected_the_tunnel_carries_at_once() -> None:
    race = Race(now=100.0, direct=[], tunnel_hold=0.0)
    race.arranged(100.0, 2, 1, meets=True)
    course = Course(race)
    world = meeting(0.03, None)

    def tunnelled(course: Course, action: object) -> None:
        if isinstance(action, Arrange):
            course.later(0.04, lambda: race.connected(course.now, action.id))
        elif not isinstance(action, SendOffer):
            world(course, action)

    course.run(tunnelled)
    assert course.kinds_given() == ["tunnel"]
    assert course.given[0][0] == pytest.approx(0.04)
    assert race.is_relayed


def test_a_tunnel_that_is_not_allowed_is_not_opened() -> None:
    course = Course(Race(now=100.0, direct=[], tunnel=False))
    course.run(relayed(tunnel=0.05, punched=None))
    assert course.given == []
    assert not any(isinstance(action, Arrange) for _, action in course.started)


def test_an_offer_without_an_answer_is_repeated_and_then_given_up() -> None:
    course = Course(Race(now=100.0, direct=[]))

    def unanswered(course: Course, action: object) -> None:
        if isinstance(action, SendOffer):
            course.race.offered(course.now)

    course.run(unanswered)
    offers = [when for when, action in course.started if isinstance(action, SendOffer)]
    assert offers == [0.0, pytest.approx(module.GO_PATIENCE), pytest.approx(2 * module.GO_PATIENCE)]
    assert course.given == []
    assert course.now - 100.0 <= module.RACE_TIME


def test_the_time_for_a_go_begins_when_the_offer_has_left() -> None:
    """What the relay sees of the ports is asked for first, and a slow relay is slow to say it."""
    course = Course(Race(now=100.0, direct=[]))
    dialled_back: list[float] = []

    def slow(course: Course, action: object) -> None:
        if isinstance(action, SendOffer):
            course.later(3.0, lambda: course.race.offered(course.now))
            course.later(6.0, lambda: dialled_back.append(course.race.arrived(course.now)))

    course.run(slow)
    assert [when for when, action in course.started if isinstance(action, SendOffer)] == [0.0]
    assert course.kinds_given()[0] == "reversed"


def test_without_the_relay_known_addresses_are_all_there_is() -> None:
    course = Course(Race(now=100.0, direct=[V4], can_offer=False))

    def refused(course: Course, action: object) -> None:
        assert isinstance(action, Dial)
        course.later(0.01, lambda: course.race.failed(course.now, action.id, "192.0.2.1 port 4000: refused"))

    course.run(refused)
    assert course.now - 100.0 < 1
    assert course.race.why == "192.0.2.1 port 4000: refused"


def test_an_address_that_refuses_is_dialled_again_until_its_source_is_back() -> None:
    race = Race(now=100.0, direct=[V4])
    course = Course(race)
    dials: list[float] = []

    def world(course: Course, action: object) -> None:
        if isinstance(action, Dial):
            dials.append(course.now - 100.0)
            if course.now < 102.0:
                course.later(0.001, lambda: race.failed(course.now, action.id, "refused"))
            else:
                course.later(0.001, lambda: race.connected(course.now, action.id))

    course.run(world)
    assert course.kinds_given() == ["direct"]
    # No relay has said anything yet; a second is the most that is lost.
    assert course.given[0][0] < 3.0
    assert len(dials) <= 7


def test_a_source_that_dials_back_is_taken_at_once() -> None:
    race = Race(now=100.0, direct=[V4])
    course = Course(race)

    def world(course: Course, action: object) -> None:
        if isinstance(action, SendOffer):
            course.later(0.1, lambda: race.arrived(course.now))

    course.run(world)
    assert course.given[0][0] == pytest.approx(0.1)
    assert course.kinds_given() == ["reversed"]


def test_quic_gives_tcp_its_chance_unless_it_is_what_is_wanted() -> None:
    begun = []
    for options in ({}, {"quic_delay": 0.0}):
        race = Race(now=100.0, direct=[], tunnel=False, **options)
        course = Course(race)

        def world(course: Course, action: object, race: Race = race) -> None:
            if isinstance(action, SendOffer) and race.rounds == 1:
                course.later(0.1, lambda: race.go(course.now, 0.02, [], [], 0, ["quic"]))
            elif isinstance(action, Arrange):
                begun.append(round(course.now - 100.0, 3))
                course.later(0.1, lambda: race.connected(course.now, action.id))

        course.run(world)
    assert begun == [pytest.approx(0.12 + module.QUIC_DELAY), pytest.approx(0.12)]


def test_all_connections_that_a_source_dials_are_waited_for() -> None:
    race = Race(now=100.0, direct=[])
    course = Course(race)

    def world(course: Course, action: object) -> None:
        if isinstance(action, SendOffer):
            race.offered(course.now, 3)
            for after in (0.1, 0.1 + module.NEXT_ARRIVAL / 2, 0.1 + module.NEXT_ARRIVAL):
                course.later(after, lambda: race.arrived(course.now))

    course.run(world)
    assert course.kinds_given() == ["reversed"] * 3
    # Nothing more is wanted, so nothing more is waited for.
    assert course.now - 100.0 == pytest.approx(0.1 + module.NEXT_ARRIVAL)


@pytest.mark.parametrize("answers", [True, False])
def test_an_address_that_answers_soon_after_a_punch_is_taken_too(answers: bool) -> None:
    def world(course: Course, action: object) -> None:
        if isinstance(action, Dial):
            if answers:
                course.later(1.2, lambda: course.race.connected(course.now, action.id))
        else:
            relayed(tunnel=None, punched=0.15)(course, action)

    course = Course(Race(now=100.0, direct=[V4]))
    course.run(world)
    assert course.kinds_given() == ["punched", "punched"] + (["direct"] if answers else [])
    assert course.now - 100.0 == pytest.approx(1.2 if answers else 0.24 + module.BETTER_WAIT)


def test_a_source_that_dials_soon_after_a_punch_is_taken_too() -> None:
    def world(course: Course, action: object) -> None:
        if isinstance(action, SendOffer):
            course.later(0.5, lambda: course.race.arrived(course.now))
        relayed(tunnel=None, punched=0.1)(course, action)

    course = Course(Race(now=100.0, direct=[]))
    course.run(world)
    assert course.kinds_given() == ["punched", "punched", "reversed"]


FATES = st.sampled_from(["connected", "failed", "silent"])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_happens_the_race_ends_and_gives_nothing_twice(data: st.DataObject) -> None:
    race = Race(
        now=100.0,
        direct=data.draw(st.lists(st.sampled_from([V4, V6, OUTSIDE]), max_size=3)),
        can_offer=data.draw(st.booleans()),
        tunnel=data.draw(st.booleans()),
    )
    if data.draw(st.booleans()):
        race.arranged(100.0, 2, data.draw(st.integers(0, 2)), meets=data.draw(st.booleans()))
    course = Course(race)
    ended: set[int] = set()

    def world(course: Course, action: object) -> None:
        if isinstance(action, ShowPorts):
            targets = data.draw(st.lists(st.just(OUTSIDE), max_size=1))
            after = data.draw(st.floats(0, 3))
            if data.draw(st.booleans()):
                course.later(after, lambda: race.met(course.now, 0.1, targets, [1, 2]))
            else:
                course.later(after, lambda: race.not_shown(course.now))
            return
        if isinstance(action, SendOffer):
            if data.draw(st.booleans()):
                names = data.draw(st.lists(st.sampled_from(["tunnel", "quic"]), unique=True))
                slots = data.draw(st.integers(0, 3))
                wait = data.draw(st.floats(-1, 2))
                course.later(
                    data.draw(st.floats(0.01, 5)), lambda: race.go(course.now, wait, [V4], [OUTSIDE], slots, names)
                )
            if data.draw(st.booleans()):
                course.later(data.draw(st.floats(0, 5)), lambda: race.arrived(course.now))
            return
        fate, after = data.draw(FATES), data.draw(st.floats(0, 6))
        attempt = action.id  # type: ignore[attr-defined]
        if fate == "connected":
            course.later(after, lambda: race.connected(course.now, attempt))
        elif fate == "failed":
            course.later(after, lambda: race.failed(course.now, attempt, "no"))
            ended.add(attempt)

    # What is begun in the race's last moment, by a go that came late, has its fate within another twenty seconds.
    course.run(world, until=100.0 + module.RACE_TIME + 20)
    given = [attempt for _, attempt in course.given]
    assert len(given) == len(set(given))
    assert not set(given) & set(course.cancelled)
    assert not set(given) & ended
    kinds = course.kinds_given()
    # Once something direct was given, the relay is not used any more.
    direct = [index for index, kind in enumerate(kinds) if kind != "tunnel"]
    assert all(kind != "tunnel" for kind in kinds[direct[0] :]) if direct else True


def _answering(after: float) -> Callable[[Course, object], None]:
    def world(course: Course, action: object) -> None:
        if isinstance(action, Dial | Arrange):
            attempt = action.id
            course.later(after, lambda: course.race.connected(course.now, attempt))

    return world


def test_the_first_addresses_are_dialled_twice_at_once_and_both_connections_are_given() -> None:
    course = Course(Race(now=100.0, direct=[V4, V6], can_offer=False, spares=2))
    course.run(_answering(0.01))
    dials = [action.candidate for _, action in course.started if isinstance(action, Dial)]
    # The other address was not needed any more.
    assert dials == [V6, V6]
    assert [when for when, _ in course.given] == [pytest.approx(0.01)] * 2
    course = Course(Race(now=100.0, direct=[V4], can_offer=False, spares=2))
    course.run(silent)
    assert len([action for _, action in course.started if isinstance(action, Dial)]) == 2


def test_a_spare_is_not_dialled_again() -> None:
    def refused(course: Course, action: object) -> None:
        if isinstance(action, Dial):
            attempt = action.id
            course.later(0.01, lambda: course.race.failed(course.now, attempt, "refused"))

    with_spare, without = (Course(Race(now=100.0, direct=[V4], can_offer=False, spares=many)) for many in (1, 0))
    for course in (with_spare, without):
        course.run(refused)
    # The offer does not wait when no address takes a connection, not even twice.
    hurried = Course(Race(now=100.0, direct=[V4], offer_delay=0.15, spares=1))
    hurried.run(refused)
    assert next(when for when, action in hurried.started if isinstance(action, SendOffer)) == pytest.approx(0.01)
    assert len(with_spare.started) == len(without.started) + 1


def test_places_at_the_tunnel_that_came_with_the_order_are_used_at_once_and_not_asked_for_again() -> None:
    race = Race(now=100.0, direct=[], spares=2)
    race.arranged(100.0, 2, 2)
    course = Course(race)
    asked: list[bool] = []

    def world(course: Course, action: object) -> None:
        if isinstance(action, SendOffer):
            asked.append(race.has_tunnel)
        _answering(0.05)(course, action)

    course.run(world)
    legs = [(when, action.leg, action.ahead) for when, action in course.started if isinstance(action, Arrange)]
    assert legs == [(0.0, 0, True), (0.0, 1, True)]
    # They stand by first.
    assert [when for when, _ in course.given] == [pytest.approx(module.TUNNEL_HOLD)] * 2
    assert asked[0]


def test_nothing_is_arranged_at_the_tunnel_where_the_policy_forbids_it() -> None:
    race = Race(now=100.0, direct=[], can_offer=False, tunnel=False)
    race.arranged(100.0, 2, 2)
    course = Course(race)
    course.run(silent)
    assert course.started == []


def test_a_leg_that_stands_by_is_let_go_when_the_source_dials() -> None:
    race = Race(now=100.0, direct=[])
    race.arranged(100.0, 1, 1)
    course = Course(race)

    def world(course: Course, action: object) -> None:
        _answering(0.05)(course, action)
        if isinstance(action, Arrange):
            course.later(0.1, lambda: course.race.arrived(course.now))

    course.run(world)
    assert course.kinds_given() == ["reversed"]
    assert course.cancelled


def test_a_relay_that_comes_during_the_race_is_asked_then() -> None:
    course = Course(Race(now=100.0, direct=[V4], can_offer=False, offer_delay=0.15))
    course.later(0.05, lambda: course.race.relay_came(course.now))
    course.later(2.0, lambda: course.race.relay_came(course.now))
    course.run(lambda _course, _action: None)
    offers = [when for when, action in course.started if isinstance(action, SendOffer)]
    # Not before it would have been asked otherwise; the next one is the next round's.
    assert offers[0] == pytest.approx(0.15)
    assert offers[1:2] == [pytest.approx(0.15 + module.OFFER_PATIENCE)]


def test_a_relay_that_was_there_is_not_asked_twice() -> None:
    course = Course(Race(now=100.0, direct=[V4]))
    course.later(1.0, lambda: course.race.relay_came(course.now))
    course.run(lambda _course, _action: None)
    offers = [when for when, action in course.started if isinstance(action, SendOffer)]
    assert offers[:2] == [0.0, pytest.approx(module.OFFER_PATIENCE)]
