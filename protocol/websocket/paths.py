"""Where the relay's web server is left for a byte stream inside WebSocket."""

LINK_PATH = "/towpath/v1/websocket/link"
TUNNEL_PATH = "/towpath/v1/websocket/tunnel"
PATHS = (LINK_PATH, TUNNEL_PATH)
