"""The database schema, one Alembic revision per change."""
