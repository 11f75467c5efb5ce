"""What can be asked for: methods with their parameters, architectures with their state dicts."""
