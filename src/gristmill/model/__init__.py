"""One model definition, its memory and its checkpoint formats."""
