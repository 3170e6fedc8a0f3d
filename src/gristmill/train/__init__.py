"""The training loop, checkpoints, schedules and metrics."""
