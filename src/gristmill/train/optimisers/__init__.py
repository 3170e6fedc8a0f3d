"""Optimisers of the training loop: `make_optimiser` builds one by name, `optimiser_tensors` names all its state."""

from gristmill.train.optimisers.build import OptimiserName, make_optimiser
from gristmill.train.optimisers.state import load_optimiser_tensors, optimiser_tensors

__all__ = ["OptimiserName", "load_optimiser_tensors", "make_optimiser", "optimiser_tensors"]
