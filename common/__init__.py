"""What the service and the worker agree on; imports neither torch, nor HTTP, nor either of them."""

__version__ = "0.1.0"
