"""The HTTP side: requests in, answers out; never imports torch."""
