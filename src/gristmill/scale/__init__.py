"""Before the run: scaling laws, the compute, memory and money of a plan, and a ladder that tests the law."""
