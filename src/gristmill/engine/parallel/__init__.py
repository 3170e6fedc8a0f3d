"""Inference on several processes: one model split over them, copies of it, and prefill apart from decoding."""
