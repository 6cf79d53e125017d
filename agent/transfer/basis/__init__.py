"""What all rooms of the engine stand on: what is asked for (`jobs`), how files are compared and digested, what may be
tried again, and what threads of storage and lanes share. Imports no other room."""
