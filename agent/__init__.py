"""The endpoint: storage, transfer engine, link to the relay, local control, command line."""
