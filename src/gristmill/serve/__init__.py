"""The OpenAI-compatible HTTP server and its page."""
