"""The race where the relay sees the ports of both sides first, so that both punch without an offer."""

from __future__ import annotations

import pytest

from agent.connect import race as module
from agent.connect.race import Arrange, Dial, Punch, Race, SendOffer, ShowPorts
from tests.agent.race_course import V4, Course, meeting, met_race, silent, when


def test_ports_are_shown_at_once_and_no_offer_is_made_where_that_helps() -> None:
    course = met_race()
    course.run(meeting(0.075, 0.06))
    assert when(course, ShowPorts) == [0.0]
    assert when(course, Punch) == [0.095, 0.095]
    assert when(course, SendOffer) == []
    assert course.kinds_given() == ["punched", "punched"]
    assert course.given[0][0] == pytest.approx(0.155)


def test_a_meeting_that_brings_nothing_is_followed_by_an_offer() -> None:
    course = met_race()
    course.run(meeting(0.075, None))
    assert when(course, SendOffer) == [pytest.approx(0.095 + module.MEETING_CHANCE)]
    assert course.kinds_given()[-1] == "punched"


def test_a_meeting_whose_punching_fails_at_once_is_followed_by_one_offer_at_once() -> None:
    course = met_race()
    world = meeting(0.075, None)

    def failing(course: Course, action: object) -> None:
        if isinstance(action, Punch) and action.ahead:
            course.later(0.01, lambda: course.race.failed(course.now, action.id, "refused"))
        else:
            world(course, action)

    course.run(failing)
    assert when(course, SendOffer) == [0.105]
    assert course.kinds_given() == ["punched", "punched"]


def test_a_meeting_that_never_comes_is_not_waited_for_for_long() -> None:
    course = met_race()
    course.run(meeting(None, None))
    assert when(course, SendOffer) == [pytest.approx(module.MEETING_PATIENCE)]


@pytest.mark.parametrize(("punched", "first"), [(0.09, "punched"), (0.25, "tunnel")])
def test_the_tunnel_waits_for_the_punching_of_a_near_peer_and_not_for_long(punched: float, first: str) -> None:
    race = Race(now=100.0, direct=[])
    race.arranged(100.0, 2, 1, meets=True)
    course = Course(race)
    world = meeting(0.2, punched)

    def tunnelled(course: Course, action: object) -> None:
        if isinstance(action, Arrange):
            course.later(0.25, lambda: race.connected(course.now, action.id))
        else:
            world(course, action)

    course.run(tunnelled)
    # The meeting took 0.2 s, two round trips to the relay; both begin 0.02 s later.
    assert course.kinds_given()[0] == first
    moment = 0.22 + (punched if first == "punched" else module.HOLD_TRIPS * 0.1)
    assert course.given[0][0] == pytest.approx(moment)
    assert "punched" in course.kinds_given()


@pytest.mark.parametrize("after", [0.01, 0.5, 1.0])
def test_a_leg_of_the_arrangement_that_fails_says_nothing_about_the_offer(after: float) -> None:
    race = Race(now=100.0, direct=[])
    race.arranged(100.0, 2, 1, meets=True)
    course = Course(race)
    world = meeting(None, None)

    def refused(course: Course, action: object) -> None:
        if isinstance(action, Arrange):
            course.later(after, lambda: race.failed(course.now, action.id, "there is no place"))
        else:
            world(course, action)

    course.run(refused)
    assert when(course, SendOffer) == [pytest.approx(module.MEETING_PATIENCE)]


def test_where_ports_cannot_be_shown_the_offer_is_made_at_once() -> None:
    course = met_race()
    world = meeting(None, None)

    def unshown(course: Course, action: object) -> None:
        if isinstance(action, ShowPorts):
            course.later(0.01, lambda: course.race.not_shown(course.now))
        else:
            world(course, action)

    course.run(unshown)
    assert when(course, SendOffer) == [0.01]


def test_no_port_is_shown_where_the_source_is_dialled_or_the_relay_is_away() -> None:
    def world(course: Course, action: object) -> None:
        if isinstance(action, Dial):
            course.later(0.05, lambda: course.race.connected(course.now, action.id))

    race = Race(now=100.0, direct=[V4], offer_delay=0.15)
    race.arranged(100.0, 2, 0, meets=True)
    course = Course(race)
    course.run(world)
    assert when(course, ShowPorts) == []
    away = met_race(can_offer=False)
    away.run(silent)
    assert when(away, ShowPorts) == []


def test_an_address_that_refuses_has_the_ports_shown_at_once() -> None:
    def world(course: Course, action: object) -> None:
        if isinstance(action, Dial):
            course.later(0.01, lambda: course.race.failed(course.now, action.id, "refused"))

    race = Race(now=100.0, direct=[V4], offer_delay=0.15)
    race.arranged(100.0, 2, 0, meets=True)
    course = Course(race)
    course.run(world)
    assert when(course, ShowPorts) == [0.01]
    assert when(course, SendOffer)[0] == pytest.approx(0.01 + module.MEETING_PATIENCE)
