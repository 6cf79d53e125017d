"""What agents and relays say to one another: codecs and state machines, and the one I/O shell both share."""
