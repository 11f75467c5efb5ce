"""Runnable examples: the demo, its attack, and scripts for CI systems."""
