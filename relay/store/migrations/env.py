"""Alembic's entry: run the migrations on the connection that `relay.store.migrate` hands over."""

from alembic import context

connection = context.config.attributes["connection"]
# The caller's transaction spans all steps; SQLite's DDL takes part in transactions like anything else.
context.configure(connection=connection, transactional_ddl=True)
context.run_migrations()
