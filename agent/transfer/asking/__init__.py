"""What a task asks of its source, and how much at a time: the control stream, requests to lanes, who has which."""
