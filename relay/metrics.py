"""The relay's numbers in Prometheus's text format. Pure.

Format: Prometheus exposition formats, version 0.0.4; names as in Prometheus's "Metric and label naming". Labels are
words of our own with few values, so the number of series does not grow with users, endpoints or tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """What one metric is called behind ``towpath_relay_``, its kind and meaning; ``label`` names what tells its series
    apart. Names of counters end in ``_total``."""

    name: str
    help: str
    label: str = ""

    @property
    def kind(self) -> str:
        """Its type in the format."""
        return "counter" if self.name.endswith("_total") else "gauge"


_INFO = Metric("info", "The relay's version.", "version")
_CONNECTIONS = Metric("connections_total", "Connections by what became of them.", "kind")
_DATABASE = Metric("database_operations_total", "Transactions of the database.", "kind")
_WAITING = Metric("database_waiting", "Transactions that wait for a turn now.", "kind")
_OFFERS = Metric("path_offers_total", "Offers of paths between agents by what became of them.", "outcome")
_STUN = Metric("stun_questions_total", "STUN questions by transport or what was wrong with them.", "kind")
_GUESSES = Metric("wrong_secrets_total", "Wrong passwords, codes and secrets that were shown.")
_ENDED = Metric("tunnels_ended_total", "Pairs of agents that the tunnel has carried, by how that ended.", "outcome")

# Each number of `Relay.statistics` by part and field: its metric, and the value of the label if that has one. Texts
# have none; a field with None is a table whose keys are the values of the label. A test holds this against the parts.
METRICS: dict[tuple[str, str], tuple[Metric, str | None]] = {
    ("web", "open"): (Metric("web_connections", "Web connections that are open now."), ""),
    ("web", "taken"): (Metric("web_connections_total", "Web connections taken."), ""),
    ("web", "refused"): (Metric("web_connections_refused_total", "Web connections refused: too many were open."), ""),
    **{
        ("dispatch", field): (_CONNECTIONS, field)
        for field in ("web", "link", "tunnel", "websocket", "stun", "plain", "refused", "failed")
    },
    ("dispatch", "pending"): (Metric("connections_pending", "Connections in their greeting or handshake now."), ""),
    ("links", "connected"): (Metric("agents_linked", "Agents that are linked now."), ""),
    ("links", "watched"): (Metric("agents_watched", "Linked agents that asked for signs of life."), ""),
    ("links", "links"): (Metric("links_total", "Links of agents that came up."), ""),
    ("links", "replaced"): (Metric("links_replaced_total", "Links that a newer one of the same agent replaced."), ""),
    ("links", "calls"): (Metric("agent_calls_total", "Calls to agents."), ""),
    ("links", "failed"): (Metric("agent_calls_failed_total", "Calls to agents that failed."), ""),
    ("links", "timeouts"): (Metric("agent_calls_timed_out_total", "Calls that an agent did not answer in time."), ""),
    ("links", "refused"): (Metric("agent_calls_refused_total", "Calls refused: too many waited for one agent."), ""),
    ("links", "waiting"): (Metric("agent_calls_waiting", "Calls to agents that wait for a turn now."), ""),
    ("links", "under_way"): (Metric("agent_calls_under_way", "Calls to agents that are under way now."), ""),
    **{("stun", field): (_STUN, field) for field in ("tcp", "udp", "refused", "malformed")},
    ("stun", "streams"): (Metric("stun_connections", "TCP connections for STUN that are open now."), ""),
    **{("signalling", field): (_OFFERS, field) for field in ("introduced", "added", "refused", "failed", "met")},
    ("tasks", "attended"): (Metric("agents_attended", "Linked agents whose events are read now."), ""),
    ("tasks", "due"): (Metric("tasks_due", "Tasks that wait for the relay to look at them now."), ""),
    ("tasks", "visiting"): (Metric("tasks_visited", "Tasks that the relay is looking at now."), ""),
    ("tasks", "visits"): (Metric("task_visits_total", "Looks at tasks."), ""),
    ("tasks", "orders"): (Metric("task_orders_total", "Orders given to destinations."), ""),
    ("tasks", "sessions"): (Metric("task_sessions_total", "Sessions announced to sources."), ""),
    ("tasks", "lines"): (Metric("task_events_total", "Lines of events and progress that agents sent."), ""),
    ("tasks", "dropped_lines"): (Metric("task_events_dropped_total", "Lines of agents that were of no use."), ""),
    ("tasks", "stream_failures"): (Metric("task_event_streams_failed_total", "Streams of events that broke."), ""),
    ("tasks", "visit_failures"): (Metric("task_visits_failed_total", "Looks at tasks that failed."), ""),
    ("tunnel", "pairs"): (Metric("tunnels", "Pairs of agents that the tunnel carries now."), ""),
    ("tunnel", "offers"): (Metric("tunnel_offers_total", "Places in the tunnel that were offered."), ""),
    ("tunnel", "denied"): (Metric("tunnel_offers_denied_total", "Places that were not: a limit was reached."), ""),
    ("tunnel", "moved"): (Metric("tunnel_bytes_total", "Bytes that the tunnel has carried."), ""),
    ("tunnel", "cpu"): (Metric("tunnel_cpu_seconds", "Processor time of the processes that run now."), ""),
    ("tunnel", "outcomes"): (_ENDED, None),
    ("tunnel", "waiting"): (Metric("tunnel_halves_waiting", "Agents that wait for the other one now."), ""),
    ("tunnel", "joined"): (Metric("tunnels_joined_total", "Pairs of agents that were joined."), ""),
    ("tunnel", "refused"): (Metric("tunnel_halves_refused_total", "Agents whose tunnel was refused."), ""),
    ("tunnel", "replayed"): (Metric("tunnel_tokens_replayed_total", "Tokens that were shown a second time."), ""),
    ("tunnel", "restarts"): (Metric("tunnel_restarts_total", "Tunnel processes that ended and were replaced."), ""),
    ("websocket", "connections"): (Metric("websocket_tunnels", "Tunnels inside WebSocket now."), ""),
    ("websocket", "carried"): (Metric("websocket_tunnels_total", "Tunnels inside WebSocket so far."), ""),
    ("websocket", "cpu"): (Metric("websocket_cpu_seconds", "Processor time of the process that runs now."), ""),
    ("websocket", "restarts"): (Metric("websocket_restarts_total", "Times its process was replaced."), ""),
    ("store", "reads"): (_DATABASE, "read"),
    ("store", "writes"): (_DATABASE, "write"),
    ("store", "waiting_readers"): (_WAITING, "read"),
    ("store", "waiting_writers"): (_WAITING, "write"),
    ("guesses", "subjects"): (Metric("guessing_subjects", "Addresses and clients that were wrong lately."), ""),
    ("guesses", "failures"): (_GUESSES, ""),
    ("audit", "written"): (Metric("audit_entries_total", "Entries of the audit log."), ""),
    ("audit", "suppressed"): (Metric("audit_entries_suppressed_total", "Strangers' requests, only counted."), ""),
    ("audit", "failed"): (Metric("audit_entries_failed_total", "Entries that could not be written."), ""),
    ("requests", "subjects"): (Metric("active_users", "People whose requests are counted now."), ""),
    ("requests", "refused"): (Metric("requests_refused_total", "Requests beyond limits.user_requests."), ""),
    ("keys", "ticket_key_expires"): (
        Metric("ticket_key_expiry_timestamp_seconds", "When the ticket key ends (Unix time)."),
        "",
    ),
    ("keys", "root_present"): (Metric("root_key_present", "Whether the root key is here and renews ticket keys."), ""),
    ("certificate", "expires"): (
        Metric("certificate_expiry_timestamp_seconds", "When the certificate of the port ends (Unix time)."),
        "",
    ),
    ("certificate", "authority_expires"): (
        Metric("authority_expiry_timestamp_seconds", "When the relay's own authority ends (Unix time)."),
        "",
    ),
    ("certificate", "self_made"): (
        Metric("certificate_self_made", "Whether the relay made its certificate itself, and renews it."),
        "",
    ),
    ("kept", "nodes"): (Metric("agents_enrolled", "Agents that have enrolled and were not revoked."), ""),
    ("kept", "tasks"): (Metric("tasks", "Tasks that are not over, by what is to become of them.", "desired"), None),
    ("kept", "database_bytes"): (Metric("database_size_bytes", "Size of the database and its log on disk."), ""),
    ("kept", "free_bytes"): (Metric("database_free_bytes", "Room left on the database's disk."), ""),
    ("process", "cpu_seconds"): (Metric("cpu_seconds_total", "Processor time of the relay's main process."), ""),
    ("process", "memory_bytes"): (Metric("resident_memory_bytes", "Memory of the relay's main process."), ""),
    ("process", "open_files"): (Metric("open_files", "Descriptors of the relay's main process."), ""),
    ("process", "max_files"): (Metric("max_open_files", "How many it may have."), ""),
    ("process", "started"): (Metric("start_timestamp_seconds", "When the relay was started (Unix time)."), ""),
}


def exposition(version: str, parts: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole text, ordered as in `METRICS`. Numbers that nobody has named are left out."""
    series: dict[Metric, list[tuple[str, float]]] = {}
    for (part, field), (metric, value) in METRICS.items():
        found = parts.get(part, {}).get(field)
        if isinstance(found, Mapping) and value is None:
            series.setdefault(metric, []).extend((key, float(number)) for key, number in sorted(found.items()))
        elif isinstance(found, bool | int | float):
            series.setdefault(metric, []).append((value or "", float(found)))
    info = list(_lines(_INFO, [(version, 1.0)]))
    return "".join([*info, *(line for metric, values in series.items() for line in _lines(metric, values))])


def _lines(metric: Metric, values: list[tuple[str, float]]) -> Iterator[str]:
    name = f"towpath_relay_{metric.name}"
    yield f"# HELP {name} {metric.help}\n# TYPE {name} {metric.kind}\n"
    for value, number in values:
        label = f'{{{metric.label}="{_escaped(value)}"}}' if metric.label else ""
        yield f"{name}{label} {number:.17g}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
