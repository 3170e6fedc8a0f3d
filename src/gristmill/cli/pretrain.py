"""gristmill pretrain: from text to a model, with any objective."""

import sys

from gristmill.pretrain.config import PretrainConfig as Config

__all__ = ["Config", "run"]


def run(config: Config) -> int:
    """Pretrain and tell where the model is. Returns 0, or 130 when stopped."""
    from gristmill.evaluate.formatting import duration
    from gristmill.pretrain.run import pretrain

    try:
        done = pretrain(config)
    except KeyboardInterrupt:
        print(f"\nStopped. The same command goes on from here ({config.directory}).", file=sys.stderr)
        return 130
    if done.is_main:
        print(
            f"{done.parameters:,} parameters, {done.position.tokens:,} tokens in {done.position.step:,} steps, "
            f"{done.epochs:.3g} epochs, {duration(done.position.seconds)}; rows {done.utilisation:.1%} full"
        )
        print(f"Model:  {done.model}\nReport: {done.report}")
    return 0
