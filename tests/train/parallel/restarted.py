"""A program for torchrun: six steps on two processes; in the first attempt the second process is killed in step 4."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from gristmill.objectives.causal import CausalLM
from gristmill.train.callbacks import Callback, Run
from gristmill.train.loop import train
from gristmill.train.parallel import DistributedWorld, Parallel, start
from gristmill.train.parallel.mesh import stop
from train.parallel.small import LLAMA, small_config, small_model
from train.toy import toy_loader


class Death(Callback):
    """The end of one process, without a word."""

    def gradients_ready(self, run: Run) -> None:
        if run.position.step == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and not run.world.is_main:
            os.kill(os.getpid(), signal.SIGKILL)


def run(directory: Path, *callbacks: Callback) -> None:
    """This process's part of the run."""
    torch.set_num_threads(1)
    world = DistributedWorld(start(Parallel(data=None), "cpu"))
    config = small_config(steps=6, checkpoint_every=2)
    train(small_model(LLAMA), CausalLM(), toy_loader(), config, directory, callbacks=callbacks, world=world)
    stop()


if __name__ == "__main__":
    run(Path(sys.argv[1]), Death())
