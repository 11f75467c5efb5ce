"""Tell whether a model has a backdoor, by searching what would trigger it."""
