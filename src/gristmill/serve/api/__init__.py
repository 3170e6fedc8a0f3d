"""The HTTP routes, one router per family."""
