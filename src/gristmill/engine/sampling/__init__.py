"""From next-token logits to tokens."""
