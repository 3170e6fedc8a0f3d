"""Callbacks that watch a run: monitors and alarms, probe tasks, TensorBoard, a live view, early stopping."""
