"""Training objectives: corruption and loss as pure functions."""
