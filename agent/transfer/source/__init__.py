"""A worker at the source: it answers the control stream, looks at folders and files, and sends."""
