"""What a task remembers on disk: journal and manifest, their formats, and what to do when they are damaged or held."""
