"""The tunnel: how two agents that cannot reach each other meet on the relay's port, and what they say there.

The relay gives each side one half of a pairing as a signed token (`token`). An agent opens TLS to the relay's port with
ALPN `towpath-tunnel/1`, shows its half (`greeting`), and when the other half has come, both end that outer TLS in order
and go on, on the same TCP connection, with the session's own TLS from end to end. What the relay moves it cannot read.
"""
