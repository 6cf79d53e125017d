"""The commands that set up and run the agent of this machine."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from agent.cli.command import with_output
from agent.cli.output import CommandFailed, Output, person
from agent.config.keys import default_config_file
from agent.config.layers import load_config
from agent.exit_codes import ExitCode
from agent.quantities import human_bytes
from protocol.control import FINAL_STATES
from protocol.errors import TowpathError
from protocol.terminal import terminal_safe, terminal_safe_lines

if TYPE_CHECKING:
    from agent.enrol import Outcome

# Tasks that are over, of which `towpath status` tells.
MAX_OVER = 5

Command = TypeVar("Command", bound=Callable[..., Any])


def config_option(command: Command) -> Command:
    """``--config FILE``; the function gets ``config_file``, absolute, the user's default one if not given."""
    option = click.option(
        "--config",
        "config_file",
        type=click.Path(dir_okay=False, path_type=Path),
        callback=lambda _ctx, _parameter, value: (value or default_config_file()).absolute(),
        help="The agent's configuration file; by default towpath/agent.yaml in the user's configuration directory.",
    )
    return option(command)


@contextlib.contextmanager
def failing_plainly() -> Iterator[None]:
    """Turn the project's errors, and those of the system, into one sentence for the user (`CommandFailed`)."""
    try:
        yield
    except TowpathError as error:
        raise CommandFailed(error.sentence) from error
    except OSError as error:
        raise CommandFailed(f"{error.filename or 'The system'}: {error.strerror or error}.") from error


@click.command()
@click.argument("key", required=False)
@click.option("--setup-key-file", type=click.Path(path_type=Path), help="Read the one-time setup key from a file.")
@click.option("--relay", "relay_url", metavar="URL", help="Without a key: sign in to this relay on any device.")
@click.option("--ca-file", help="With --relay: its CA certificate, when it made its own.")
@click.option("--root", required=True, help="The folder to offer as a collection.")
@click.option("--name", help="What to call the collection; the relay's name for it if not given.")
@click.option("--read-only", is_flag=True, help="Let others read, never write.")
@click.option("--sharing", is_flag=True, help="Let access rules open its folders to others.")
@click.option("--home", default="/", show_default=True, help="The folder inside the collection that ~ stands for.")
@click.option("--default-directory", default="/~/", show_default=True, help="Where clients start in the collection.")
@click.option("--state-dir", type=click.Path(path_type=Path), help="Where the agent keeps its state.")
@click.option("--globus-files", is_flag=True, help="Also write ~/.globusonline/lta/client-id.txt.")
@config_option
@with_output
def setup(
    out: Output,
    key: str | None,
    setup_key_file: Path | None,
    relay_url: str | None,
    ca_file: str | None,
    root: str,
    name: str | None,
    read_only: bool,
    sharing: bool,
    home: str,
    default_directory: str,
    state_dir: Path | None,
    globus_files: bool,
    config_file: Path,
) -> None:
    """Enrol this machine with a one-time setup KEY, or add a collection to it.

    The key may also come from --setup-key-file or the environment variable TOWPATH_SETUP_KEY, where other users of
    the machine cannot see it. A set-up that was interrupted is completed by repeating the same command.

    Without a key, --relay URL shows a code; type it in on any device where you can sign in.
    """
    from agent.enrol import Wish, checked_root, find_setup_key, set_up, write_globus_files

    wish = Wish(
        root=root,
        name=name,
        read_only=read_only,
        shareable=sharing,
        home=home,
        default_directory=default_directory,
    )
    if relay_url is not None:
        if key is not None or setup_key_file is not None:
            raise click.UsageError("--relay is for setting up without a key.")
        # Nobody signs in, and no collection is made, for a folder that is not there.
        with failing_plainly():
            checked_root(root)
        from agent.cli.enrolment_login import setup_key_by_sign_in

        key = setup_key_by_sign_in(relay_url, ca_file, name)
    with failing_plainly():
        outcome = set_up(find_setup_key(key, setup_key_file), wish, config_file, state_dir)
        if globus_files:
            write_globus_files(outcome.collection_id, Path.home())
    _tell(out, outcome, config_file)


def _tell(out: Output, outcome: Outcome, config_file: Path) -> None:
    if out.is_json:
        served = bool(tell_running_agent(outcome.state_dir))
        out.document(
            {
                "collection_id": outcome.collection_id,
                "endpoint_id": outcome.endpoint_id,
                "name": outcome.name,
                "root": outcome.root,
                "relay_url": outcome.relay_url,
                "config_file": str(outcome.config_file),
                "state_dir": str(outcome.state_dir),
                "was_set_up": outcome.already,
                "served": served,
            }
        )
        return
    done = "was set up before with this key" if outcome.already else "is set up"
    click.echo(f"Collection {terminal_safe(outcome.name)} ({outcome.collection_id}) {done}: {outcome.root}")
    click.echo(f"Endpoint {outcome.endpoint_id} of the relay {outcome.relay_url}; configuration {outcome.config_file}")
    warn_of_exposure(outcome.collection_id, config_file)
    if tell_running_agent(outcome.state_dir):
        click.echo("The running agent serves it now.")
    else:
        click.echo("Run the agent with `towpath start` (or `towpath run` in the foreground).")


def warn_of_exposure(collection_id: str, config_file: Path) -> None:
    """Say so when the agent's own files lie in a collection that was just made or changed, or the other way round."""
    from agent.config.exposure import exposures, unusable
    from agent.config.layers import load_config

    with failing_plainly():
        found = load_config(config_file)
    for kind, said in (("Note", exposures(found, config_file)), ("Warning", unusable(found))):
        for collection, sentence in said:
            if collection.id == collection_id:
                click.echo(f"{kind}: {terminal_safe(sentence)}", err=True)


def tell_running_agent(state_dir: Path) -> str:
    """Have a running agent take up the changed configuration; what it says of it, empty if none runs.

    Raises `CommandFailed` when it refuses."""
    from agent import local_socket

    try:
        document = local_socket.ask(state_dir, "POST", "/reload")
    except local_socket.NotRunning:
        return ""
    except TowpathError as error:
        raise CommandFailed(f"The running agent does not take the new configuration: {error.sentence}") from error
    return str(document.get("message") or "The running agent has taken it up.")


@click.command()
@click.option("--log-file", type=click.Path(path_type=Path), help="Log to this file, kept small, not to stderr.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="A setting for this run only.")
@click.option("--login-node", is_flag=True, help="Manners for a machine shared by many people; sets the profile.")
@config_option
def run(log_file: Path | None, assignments: tuple[str, ...], login_node: bool, config_file: Path) -> None:
    """Run the agent in the foreground, until Ctrl-C or SIGTERM. SIGHUP reads the configuration again."""
    from agent import start

    flags = {"profile": "login-node"} if login_node else {}
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        if not sign:
            raise click.UsageError(f"--set takes KEY=VALUE, not {assignment!r}.")
        flags[key] = value
    with failing_plainly():
        start.run(config_file, flags, log_file)


@click.command()
@config_option
@with_output
def start(out: Output, config_file: Path) -> None:
    """Start the agent in the background and wait until it serves."""
    from agent.cli.background import LOG_FILE, start_detached
    from agent.identity_file import make_state_dir, require
    from agent.lock import AlreadyRunning, holder_of

    with failing_plainly():
        config = load_config(config_file)
        make_state_dir(config.state_dir)
        require(config.state_dir)
        holder = holder_of(config.state_dir)
        if holder is not None:
            raise AlreadyRunning(config.state_dir, holder)
        pid = start_detached(config_file, config)
    log = config.state_dir / LOG_FILE
    document = {"running": True, "pid": pid, "log_file": str(log), "state_dir": str(config.state_dir)}
    out.result(document, f"The agent runs as process {pid}; its log is {log}.")


@click.command()
@click.option("--drain", is_flag=True, help="Begin nothing new, and stop when what has begun is finished.")
@click.option("--timeout", type=click.FloatRange(min=0), help="With --drain: stop all the same after so many seconds.")
@config_option
@with_output
def stop(out: Output, drain: bool, timeout: float | None, config_file: Path) -> None:
    """Stop the agent; running transfers are settled and go on at the next start.

    With --drain they finish first, and nothing new begins, also after the next start, until `towpath resume`. Tasks
    that wait for a person (a full disk, say) are named and not waited for. What has not finished goes on at the next
    start. Ctrl-C ends the waiting alone: the agent goes on draining.
    """
    if timeout is not None and not drain:
        raise click.UsageError("--timeout is for --drain; without it the agent stops within seconds.")
    from agent.cli.background import drained, stop_running
    from agent.config.layers import state_dir_of

    state_dir = state_dir_of(config_file)
    with failing_plainly():
        unfinished = drained(state_dir, out.remark, timeout) if drain else None
        if unfinished is not None:
            left = "What has begun goes on after the next start." if unfinished else "Nothing runs any more."
            out.remark(f"{left} New transfers wait for `towpath resume`, also then.")
        holder = stop_running(state_dir)
    said = "No agent runs." if holder is None else f"The agent (process {holder.pid}) has stopped."
    document: dict[str, object] = {"running": False, "stopped": holder is not None, "pid": holder and holder.pid}
    if drain:
        document["unfinished"] = [task["task_id"] for task in unfinished or ()]
    out.result(document, said)


@click.command()
@config_option
@with_output
def status(out: Output, config_file: Path) -> None:
    """Say what the agent of this machine is doing. Exit code 1 when it does not run."""
    from agent import local_socket
    from agent.config.layers import state_dir_of

    state_dir = state_dir_of(config_file)
    try:
        document = local_socket.ask(state_dir, "GET", "/status")
    except local_socket.NotRunning as error:
        with failing_plainly():
            load_config(config_file)
        document = _not_running(config_file, state_dir)
        if not out.is_json:
            raise CommandFailed(_why_not(document) or error.sentence) from error
    except TowpathError as error:
        raise CommandFailed(error.sentence) from error
    if out.is_json:
        out.document(document)
    else:
        _print_status(document)
    if not document["running"]:
        sys.exit(ExitCode.OTHER)


def _not_running(config_file: Path, state_dir: Path) -> dict[str, Any]:
    """What can be said without the agent."""
    from dataclasses import asdict

    from agent.lock import holder_of

    with failing_plainly():
        holder = holder_of(state_dir)
    return {
        "running": False,
        "held_by": None if holder is None else asdict(holder),
        "config_file": str(config_file),
        "state_dir": str(state_dir),
    }


def _why_not(document: dict[str, Any]) -> str:
    holder = document["held_by"]
    if holder is None:
        return ""
    return (
        f"Process {holder['pid']} on host {holder['host']} runs the agent of {document['state_dir']}, but does not "
        "answer here; it may be starting, ending, or on another machine."
    )


def read_from_here(sessions: int) -> str:
    """What a source says of itself: how many transfers to other machines are connected, moving or about to end."""
    if sessions == 1:
        return "1 transfer to another machine reads from here."
    return f"{sessions} transfers to other machines read from here."


def _how_far_drained(document: dict[str, Any]) -> str:
    if document["idle"]:
        return ", nothing new begins and nothing runs"
    if document.get("drained"):
        return ", nothing new begins and what has begun waits for people"
    return ", finishes what has begun"


def _print_status(document: dict[str, Any]) -> None:
    link = document["link"]
    inside = " (inside WebSocket)" if link.get("wrapping") == "websocket" else ""
    where = (
        f"linked to {link['relay_url']}{inside}"
        if link["connected"]
        else f"not linked: {link['last_error'] or 'connecting'}"
    )
    paused = ", paused by its owner" if document["paused"] else ""
    if document.get("draining"):
        paused = _how_far_drained(document)
    click.echo(f"Agent {document['version']}, process {document['pid']}{paused}, {terminal_safe(where)}")
    click.echo(f"Configuration {document['config_file']}, state in {document['state_dir']}")
    if document.get("held_back"):
        click.echo(terminal_safe(document["held_back"]))
    if document.get("update_available"):
        click.echo(f"Version {document['update_available']} is there; `towpath update install` installs it.")
    if document["config_problem"]:
        click.echo("The changed configuration is not used, the one before stays in force:")
        click.echo("  " + terminal_safe_lines(document["config_problem"]).replace("\n", "\n  "))
    network = document.get("network")
    if network:
        seen = f", seen by the relay at {network['observed']}" if network["observed"] else ""
        click.echo(
            f"Network: data port {document['data_port']} ({', '.join(network['families'])}){terminal_safe(seen)}"
        )
        if network["mappings"]:
            click.echo(f"  {terminal_safe(network['port_mapping'])}")
    for row in document["collections"]:
        access = "read-only" if row["read_only"] else "read-write"
        state = "available" if row["available"] else f"not available: {row['reason']}"
        click.echo(f"  collection {terminal_safe(row['name'])} ({row['id']}): {access}, {terminal_safe(state)}")
    sessions = document["transfer"]["sessions"]
    if sessions:
        click.echo(f"  {read_from_here(sessions)}")
    _print_tasks(document["tasks"])


def _print_tasks(tasks: list[dict[str, Any]]) -> None:
    """All that are not over, and a few that are: these stay for days, and there may be very many."""
    over = [task for task in tasks if task["state"] in FINAL_STATES]
    for task in tasks:
        if task["state"] not in FINAL_STATES:
            _print_task(task)
    for task in over[-MAX_OVER:]:
        _print_task(task)
    if len(over) > MAX_OVER:
        click.echo(f"  and {len(over) - MAX_OVER} earlier task(s) that are over; `towpath task list` lists yours.")


def _print_task(task: dict[str, Any]) -> None:
    counters, sentence = task["counters"], ""
    files = f"{counters['files_transferred']} of {counters['files']} file(s)"
    if task["status_code"] not in ("OK", "QUEUED", task["state"]) or task["status_sentence"]:
        sentence = f"\n    {terminal_safe(task['status_sentence'] or task['status_code'])}"
        sentence += f" (up to {person(task['who'])})" if task["who"] else ""
    did = (
        [human_bytes(counters["bytes_transferred"])] if counters["bytes_transferred"] or not counters["deleted"] else []
    )
    if counters["deleted"]:
        did.append(f"{counters['deleted']} deleted")
    click.echo(f"  task {task['task_id']}: {task['state']}, {files}, {', '.join(did)}{sentence}")
    if task["path"]:
        click.echo(f"    path: {terminal_safe(task['path'])}")
