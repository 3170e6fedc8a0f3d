"""Training on many processes: one layout, one device mesh, and a `World` for the loop.

Processes are started by torchrun (docs/scale-out.md). `start(Parallel(...))` joins them, and `train(world=...)` runs as
on one: the same batches make a step, and losses and weights agree within rounding.
"""

from gristmill.train.parallel.layout import Parallel
from gristmill.train.parallel.mesh import Mesh, start
from gristmill.train.parallel.world import DistributedWorld

__all__ = ["DistributedWorld", "Mesh", "Parallel", "start"]
