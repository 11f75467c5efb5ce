"""Real things that tests stand on: a Postgres and a Redis, started from wheels."""
