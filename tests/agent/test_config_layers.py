"""Layers of the configuration: what counts more, where it comes from, and that the owner's file is never touched."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from agent.cli.main import cli
from agent.config.document import Problem, compose
from agent.config.keys import ConfigError, parse_config
from agent.config.layers import (
    UnknownSetting,
    editing,
    entry_in,
    load,
    load_config,
    overlay_file,
    remove_entry,
    set_in_overlay,
    state_dir_of,
    unset_in_overlay,
)
from agent.config.migrate import Renamed, migrated
from agent.config.show import json_schema
from agent.enrol import template

ONE = "6c54cade-bde5-45c1-bdea-f4bd71dba2cc"
TWO = "7d65dbef-cef6-46d2-aefb-05ce82ecb3dd"
OWNERS = f"""\
# mine, hands off
limits:
  lanes: 3   # three
collections:
- id: {ONE}
  name: One
  root: /one
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "agent.yaml"
    path.write_text(OWNERS)
    return path


def test_each_layer_counts_more_than_the_one_below(file: Path) -> None:
    assert load_config(file, environment={}).limits.lanes == 3
    set_in_overlay(file, "limits.lanes", "5")
    assert load_config(file, environment={}).limits.lanes == 5
    environment = {"TOWPATH_AGENT_LIMITS_LANES": "7", "TOWPATH_AGENT_DATA_ADVERTISE": "[a.example, 192.0.2.1]"}
    config = load_config(file, environment=environment)
    assert (config.limits.lanes, config.data.advertise) == (7, ("a.example", "192.0.2.1"))
    assert load_config(file, environment=environment, flags={"limits.lanes": "9"}).limits.lanes == 9
    loaded = load(file, environment=environment)
    assert loaded.origins["limits", "lanes"] == "environment"
    assert loaded.origins["collections", ONE, "name"] == f"{file}:6"
    assert file.read_text() == OWNERS
    assert overlay_file(file).stat().st_mode & 0o777 == 0o600


def test_a_profile_is_below_what_the_owner_says(file: Path) -> None:
    config = load_config(file, environment={}, flags={"profile": "login-node"})
    assert (config.limits.workers, config.limits.lanes) == (1, 3)


def test_off_is_a_word_where_words_are_wanted_and_false_where_it_is_yes_or_no(file: Path) -> None:
    set_in_overlay(file, "update.mode", "off")
    set_in_overlay(file, "data.port_mapping", "off")
    config = load_config(file, environment={})
    assert (config.update.mode, config.data.port_mapping) == ("off", False)
    with pytest.raises(ConfigError, match="must be auto or notify or off"):
        set_in_overlay(file, "update.mode", "true")


def test_unset_gives_the_owners_word_back(file: Path) -> None:
    set_in_overlay(file, "limits.lanes", "5")
    assert unset_in_overlay(file, "limits.lanes")
    assert not unset_in_overlay(file, "limits.lanes")
    assert load_config(file, environment={}).limits.lanes == 3
    assert "limits" not in (yaml.safe_load(overlay_file(file).read_text()) or {})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("limits.lanes", "99", "between 1 and 32"),
        ("limits.lanes", "many", "whole number"),
        ("limits.lanes", "[", "not valid YAML"),
        ("data.port", "99999", "`data.port` must be between"),
        ("limits.bandwidth.receive", "20", r"`limits.bandwidth.receive` must be a rate with its unit, such as 20 MB/s"),
        (f"collections.{ONE}.limits.sessions", "0", "`limits.sessions` must be"),
        (f"collections.{ONE}.access", "all", "read-only or read-write"),
    ],
)
def test_a_value_that_will_not_do_is_refused_and_nothing_is_written(
    file: Path, key: str, value: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        set_in_overlay(file, key, value)
    assert not overlay_file(file).exists()


def test_a_refused_value_is_not_blamed_on_a_line_that_was_not_written(file: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        set_in_overlay(file, "limits.lanes", "99")
    assert refused.value.sentence == "Nothing was changed.\n`limits.lanes` must be between 1 and 32, not 99."


@pytest.mark.parametrize("key", ["limit.lanes", "limits", "collections", f"collections.{ONE}", "limits.lanes.x"])
def test_keys_that_are_no_single_setting_are_refused(file: Path, key: str) -> None:
    with pytest.raises(UnknownSetting):
        set_in_overlay(file, key, "1")
    assert not overlay_file(file).exists()


def test_misspelt_variables_are_mistakes(file: Path) -> None:
    with pytest.raises(ConfigError, match="TOWPATH_AGENT_LIMITS_LANE"):
        load_config(file, environment={"TOWPATH_AGENT_LIMITS_LANE": "1"})
    with pytest.raises(ConfigError, match=r"TOWPATH_AGENT_LIMITS_LANES:1: .*whole number"):
        load_config(file, environment={"TOWPATH_AGENT_LIMITS_LANES": "x"})
    with pytest.raises(ConfigError, match=r"--set x\.y"):
        load_config(file, environment={}, flags={"x.y": "1"})


def test_entries_of_lists_are_changed_added_and_removed_by_their_id(file: Path) -> None:
    set_in_overlay(file, f"collections.{ONE}.name", "Renamed")
    set_in_overlay(file, f"collections.{ONE}.access", "read-only")
    (one,) = load_config(file, environment={}).collections
    assert (one.name, one.root, one.read_only) == ("Renamed", "/one", True)
    with editing(file) as content:
        entry_in(content, "collections", TWO).update(name="Two", root="/two")
    assert [row.id for row in load_config(file, environment={}).collections] == [ONE, TWO]
    with editing(file) as content:
        remove_entry(content, "collections", ONE, owners=True)
    assert [row.id for row in load_config(file, environment={}).collections] == [TWO]
    with editing(file) as content:
        remove_entry(content, "collections", TWO, owners=False)
    assert load_config(file, environment={}).collections == ()
    with editing(file) as content:
        entry_in(content, "collections", ONE)["sharing"] = True
    (one,) = load_config(file, environment={}).collections
    assert (one.name, one.shareable) == ("One", True)
    assert file.read_text() == OWNERS


def test_what_the_overlay_says_of_a_collection_that_the_owner_took_out_is_forgotten(file: Path) -> None:
    set_in_overlay(file, f"collections.{ONE}.name", "Renamed")
    file.write_text("limits: {lanes: 3}\n")
    assert load_config(file, environment={}).collections == ()


def test_a_mistake_in_the_overlay_names_the_overlay(file: Path) -> None:
    overlay_file(file).write_text("limits:\n  lanes: 0\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, environment={})
    assert caught.value.file == overlay_file(file)
    assert caught.value.problems[0].line == 2


def test_removed_is_a_word_of_the_overlay_only(file: Path) -> None:
    file.write_text(OWNERS + "  removed: true\n")
    with pytest.raises(ConfigError, match="Unknown key `removed`"):
        load_config(file, environment={})


# --- the schema ----------------------------------------------------------------------------------------------


def test_the_published_schema_is_the_one_of_the_code() -> None:
    published = json.loads((Path(__file__).parents[2] / "conf" / "agent.schema.json").read_text())
    assert published == json_schema(), "run `towpath config schema > conf/agent.schema.json`"
    jsonschema.Draft202012Validator.check_schema(published)
    jsonschema.validate(yaml.safe_load(template()), published)


def test_every_default_of_the_schema_is_one_that_it_takes() -> None:
    def defaults(schema: Any) -> Iterator[dict[str, Any]]:
        if isinstance(schema, dict):
            if "default" in schema and "description" in schema:
                yield schema
            for below in schema.values():
                yield from defaults(below)
        elif isinstance(schema, list):
            for below in schema:
                yield from defaults(below)

    found = list(defaults(json_schema()))
    assert len(found) > 30
    for one in found:
        jsonschema.validate(one["default"], one)


# One entry of each list of entries, to be taken as it is.
_ENTRIES = {
    "collections": {"id": ONE, "name": "n", "root": "/data"},
    "timetable": {"name": "n", "when": "sat,sun"},
    "watch": {"name": "n", "collection": ONE, "destination": TWO},
}
_VALUES = [
    *(ONE, "/data", "~/x", "x", "a/b", "/../x", "/a/..", "::1", "0.0.0.0", "/{path}", "a b", "a\tb", "é", ""),
    *("https://r.example", "http://r.example", "https://u@r.example", "https://r.example/p", "http://r.example:3128"),
    *("auto", "none", "off", "0 2 * * *", "10 MB/s", "sat", "x" * 65, "x" * 300),
    *(None, True, False, -1, 0, 1, 20, 3600, 70000, 0.5, [], {}, ["x"], [1], {"x": 1}),
]


def _places(schema: dict[str, Any], place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every setting of the schema, every section, and an entry of every list, each with what may stand there alone."""
    for row in schema.get("anyOf", [schema]):
        for key, below in row.get("properties", {}).items():
            yield (*place, key)
            yield from _places(below, (*place, key))
        if row.get("type") == "array":
            yield (*place, 0)
            yield from _places(row["items"], (*place, 0))


def _words(schema: Any) -> Iterator[Any]:
    """What the schema names word by word."""
    if isinstance(schema, dict):
        yield from (word for word in (*schema.get("enum", ()), schema.get("const")) if isinstance(word, str))
        schema = list(schema.values())
    if isinstance(schema, list):
        for below in schema:
            yield from _words(below)


def _document(place: tuple[str | int, ...], value: Any) -> Any:
    """A document with nothing but this value in this place, and what an entry needs around it."""
    for number in reversed(range(len(place))):
        key = place[number]
        if isinstance(key, str):
            value = {key: value}
        elif isinstance(value, dict):
            value = [_ENTRIES.get(str(place[number - 1]), {}) | value]
        else:
            value = [value]
    return value


def test_what_the_reader_takes_the_schema_takes_too() -> None:
    """Whatever the setting: each is taken with some value, so that none is passed over."""
    schema = json_schema()
    validator = jsonschema.Draft202012Validator(schema)
    values = [*_VALUES, *dict.fromkeys(word for word in _words(schema) if word not in _VALUES)]
    places = dict.fromkeys(_places(schema))
    taken = set()
    for place, value in itertools.product(places, values):
        document = _document(place, value)
        try:
            parse_config(json.dumps(document).encode(), Path("/x/agent.yaml"))
        except ConfigError:
            continue
        taken.add(place)
        validator.validate(document)
    assert [place for place in places if place not in taken] == []


@pytest.mark.parametrize(
    "text",
    ["limits: {lanes: 0}", "relay: {url: 'http://x.example'}", "surprise: 1", "collections: [{name: a}]", "log: 1"],
)
def test_what_the_reader_refuses_the_schema_refuses_too(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_config(text.encode(), Path("/x/agent.yaml"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), json_schema())


# --- older versions ------------------------------------------------------------------------------------------

STEPS = {
    1: [Renamed("limits.streams", "limits.lanes"), Renamed("collections.[].label", "collections.[].name")],
    2: [Renamed("port", "data.port")],
}


def plain(text: str, current: int = 3) -> Any:
    node = migrated(compose(text.encode(), Path("f")), Path("f"), steps=STEPS, current=current)
    return yaml.SafeLoader("").construct_document(node)


def test_older_versions_are_understood() -> None:
    old = "port: 5\nlimits: {streams: 4}\ncollections:\n- {label: a}\n- {name: b}\n"
    assert plain(old) == {"data": {"port": 5}, "limits": {"lanes": 4}, "collections": [{"name": "a"}, {"name": "b"}]}
    assert plain("version: 2\nport: 5\nlimits: {streams: 4}\n") == {
        "version": 3,
        "data": {"port": 5},
        "limits": {"streams": 4},
    }
    assert plain("version: 3\nport: 5\n") == {"version": 3, "port": 5}
    assert plain("- 1\n") == [1]


def test_old_and_new_name_at_once_is_a_mistake_of_the_old_ones_line() -> None:
    with pytest.raises(ConfigError) as caught:
        plain("limits:\n  lanes: 1\n  streams: 2\n")
    assert caught.value.problems == [
        Problem(3, "`streams` is now called `lanes`, and both are given; remove the old one.")
    ]


def test_a_version_of_the_future_is_refused_with_its_line() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(b"limits: {}\nversion: 99\n", Path("f"))
    ((line, sentence),) = caught.value.problems
    assert line == 2
    assert "Update it" in sentence


def test_the_state_directory_is_found_while_the_file_has_mistakes(file: Path, tmp_path: Path) -> None:
    assert state_dir_of(file) == tmp_path / "agent.state"
    file.write_text("state_dir: here\nsurprise: 1\n")
    assert state_dir_of(file) == tmp_path / "here"
    file.write_text("state_dir: /there\nbroken: [\n")
    assert state_dir_of(file) == Path("/there")
    file.write_text("broken: [\n")
    assert state_dir_of(file) == tmp_path / "agent.state"


# --- commands ------------------------------------------------------------------------------------------------


def invoke(file: Path, *arguments: str, **options: Any) -> Any:
    return CliRunner().invoke(cli, ["config", *arguments, "--config", str(file)], **options)


def test_show_set_and_unset(file: Path) -> None:
    assert invoke(file, "show", "limits.lanes").output == "3\n"
    assert invoke(file, "set", "log.format", "json").exit_code == 0
    assert invoke(file, "show", "log.format").output == "json\n"
    assert f"{overlay_file(file)}:" in invoke(file, "show", "log", "--origin").output
    document = json.loads(invoke(file, "show", "-F", "json").output)
    assert document[f"collections.{ONE}.root"] == {"value": "/one", "origin": f"{file}:7"}
    assert document["data.port"] == {"value": 0, "origin": "default"}
    assert invoke(file, "unset", "log.format").exit_code == 0
    assert invoke(file, "unset", "log.format").exit_code == 1
    assert invoke(file, "show", "nothing").exit_code == 1
    assert file.read_text() == OWNERS


def test_check_tells_programs_every_mistake_with_its_line(file: Path, tmp_path: Path) -> None:
    fine = json.loads(invoke(file, "check", "-F", "json").output)
    assert fine["problems"] == []
    assert fine["warnings"], "its folders are not there"
    file.write_text("limits: {lanes: 99}\ndata:\n  prot: 1\n")
    wrong = invoke(file, "check", "-F", "json", standalone_mode=False)
    assert wrong.return_value == 1
    problems = json.loads(wrong.output)["problems"]
    assert [(row["file"], row["line"]) for row in problems] == [(str(file), 1), (str(file), 3)]
    assert "`limits.lanes` must be between" in problems[0]["sentence"]


def test_the_password_of_a_proxy_is_not_among_all_settings(file: Path) -> None:
    """What is shown goes into tickets and chats."""
    address = "http://bob:canary77@proxy.example.org:3128"
    assert invoke(file, "set", "relay.proxy", address).exit_code == 0
    for words in (["show"], ["show", "relay"], ["show", "--origin"], ["show", "-F", "json"]):
        output = invoke(file, *words).output
        assert "canary77" not in output
        assert "@proxy.example.org:3128" in output
    assert invoke(file, "show", "relay.proxy").output.strip() == address


def editor(tmp_path: Path, *texts: str) -> str:
    """An editor that writes one text after the other."""
    for number, text in enumerate(texts):
        (tmp_path / f"text{number}").write_text(text)
    script = tmp_path / "editor.sh"
    script.write_text(
        f'#!/bin/sh\nn=$(cat {tmp_path}/count 2>/dev/null || echo 0)\ncat {tmp_path}/text$n > "$1"\n'
        f"echo $((n+1)) > {tmp_path}/count\n"
    )
    script.chmod(0o755)
    return str(script)


def test_edit_takes_only_a_file_without_mistakes(file: Path, tmp_path: Path) -> None:
    file.chmod(0o640)
    good = OWNERS.replace("lanes: 3", "lanes: 4")
    wrong = OWNERS.replace("lanes: 3", "lanes: 400")
    environment = {"VISUAL": editor(tmp_path, wrong, wrong, good)}
    refused = invoke(file, "edit", env=environment, input="n\n")
    assert f"{file}:3: " in refused.output
    assert file.read_text() == OWNERS
    mended = invoke(file, "edit", env=environment, input="y\n")
    assert mended.exit_code == 0, mended.output
    assert file.read_text() == good
    assert file.stat().st_mode & 0o777 == 0o640
