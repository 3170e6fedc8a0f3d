"""Weights in eight or four bits: rounding, calibrated rounding, layers, checkpoints."""
