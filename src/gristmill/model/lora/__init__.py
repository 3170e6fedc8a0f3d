"""Low-rank adapters of a decoder's matrices: what they compute, and PEFT's files."""
