"""From requests to answers: how a prompt is made, handed to an engine, and its outputs written for the client."""
