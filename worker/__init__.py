"""Jobs on a device: the only place that knows torch."""
