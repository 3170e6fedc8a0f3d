"""Pretraining from text to a model on disk, with any objective."""
