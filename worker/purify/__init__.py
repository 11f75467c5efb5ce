"""Purify backdoored models with a few clean images: pure torch, no HTTP, no queue, no files."""
