"""QUIC between two agents, for paths that let UDP through and TCP not.

`engine` hides which library speaks QUIC, `introduction` makes the two ends prove who they are, `credit` holds back a
sender whose receiver cannot follow, `carrier` moves bytes between QUIC streams and local stream sockets, `process` is
where a carrier runs, `transport` is the daemon's side: candidates, punching, and processes.

What comes out is a local stream socket for each QUIC stream, on which the session's own TLS is spoken like on any
other: workers do not know what carries them, and what holds for TCP lanes about certificates holds here too.
"""
