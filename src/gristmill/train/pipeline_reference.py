"""A pipeline in one process: the jobs of a schedule done one at a time, in its order, on real modules.

The oracle of what a schedule computes: a stage sees only what its neighbours hand over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gristmill.errors import RequestError
from gristmill.train.schedule_simulator import Job, Schedule, simulate


def run_schedule(
    stages: Sequence[nn.Module],
    schedule: Schedule,
    micro_inputs: Sequence[Tensor],
    loss_sum: Callable[[Tensor, int], Tensor],
) -> tuple[Tensor, list[Job]]:
    """Add the gradient of the summed loss of all micro-batches to the stages' parameters.

    `loss_sum(output, micro)` is the loss of one micro-batch on the last stage's output, already divided by the count
    over the whole batch when a mean is wanted. Returns the sum of the losses and the jobs in the order they were done.
    Raises RequestError when the schedule is for other numbers of stages or micro-batches.
    """
    if len(schedule) != len(stages) or len(schedule[0]) != 2 * len(micro_inputs):
        raise RequestError(
            f"the schedule is for {len(schedule)} stages and {len(schedule[0]) // 2} micro-batches, got {len(stages)} "
            f"and {len(micro_inputs)}"
        )
    trace = simulate(schedule).trace
    read: dict[tuple[int, int], Tensor] = {}
    made: dict[tuple[int, int], Tensor] = {}
    total = torch.zeros(())
    for job in trace:
        here, last = (job.stage, job.micro), job.stage == len(stages) - 1
        if job.backward:
            output = made.pop(here)
            gradient = None if last else read.pop((job.stage + 1, job.micro)).grad
            output.backward(gradient)
            continue
        x = micro_inputs[job.micro] if job.stage == 0 else made[job.stage - 1, job.micro].detach().requires_grad_()
        read[here] = x
        made[here] = stages[job.stage](x)
        if last:
            made[here] = loss_sum(made[here], job.micro)
            total = total + made[here].detach()
    return total, trace
