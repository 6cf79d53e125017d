"""The tunnel of last resort: joins two connections of one session and moves their bytes unread.

`pairing` knows which halves belong together, `acceptor` meets the agents, `service` hands joined pairs to `process`, a
process of its own, where `mover` moves the bytes (`splice`) within `limits`, fairly among users and sessions.
"""
