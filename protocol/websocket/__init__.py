"""A byte stream inside WebSocket (RFC 6455): the link and the tunnel where only real HTTPS passes.

`core` is the protocol without I/O, on the library websockets; `stream` puts it on a trio stream; `shuttle` joins TLS
with WebSocket inside to a local stream socket, in a process of its own (`process`) that `carrier` runs.
"""
