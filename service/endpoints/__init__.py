"""The addresses of the service: each endpoint fetches, refuses, answers."""
