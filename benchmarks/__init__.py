"""Measurements behind every number that the project quotes; results are recorded under ``results/``."""
