"""HTTP/2 with the roles reversed: the agent dials, the relay asks.

`serve` is the agent's end (an ASGI server), `connect` the relay's (a client). Both run over any trio stream that is
already secured, and stand on one sans-I/O `core`.
"""

from protocol.reverse_http.carrier import Ending
from protocol.reverse_http.client import Client, ClientStatistics, Response, StreamingResponse, connect
from protocol.reverse_http.errors import AnswerTooLarge, CallReset, CallTimeout, Flood, LinkLost
from protocol.reverse_http.limits import DEFAULT_LIMITS, Limits
from protocol.reverse_http.server import ASGIApplication, CallerLeft, serve

__all__ = [
    "DEFAULT_LIMITS",
    "ASGIApplication",
    "AnswerTooLarge",
    "CallReset",
    "CallTimeout",
    "CallerLeft",
    "Client",
    "ClientStatistics",
    "Ending",
    "Flood",
    "Limits",
    "LinkLost",
    "Response",
    "StreamingResponse",
    "connect",
    "serve",
]
