"""Self-speculation: the first layers of the target, with its final norm and head, draft for all of them.

Their keys and values are the target's own, so they lie in its own memory: those of all known tokens are there already,
and what drafting writes behind them, verification overwrites with all layers.

Source: Elhoushi et al. 2024 (LayerSkip), without its training; Zhang et al. 2023 (Draft & Verify).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gristmill.engine.memory.paged_cache import Chunk
from gristmill.engine.native.decoder import DecoderStruct
from gristmill.engine.native.runner import NativeRunner
from gristmill.engine.runner import Runner, TorchRunner
from gristmill.engine.speculation.proposer import Draft, DraftRequest
from gristmill.engine.speculation.rollout import Drafting, longest_draft, roll_out
from gristmill.errors import RequestError


def exit_runner(target: Runner, layers: int) -> TorchExitRunner | NativeExitRunner:
    """What runs the first `layers` layers of another runner's model in that runner's memory.

    Raises RequestError (`layers`) unless some layers are left out, and for a runner that does not know its layers.
    """
    if not isinstance(target, (TorchRunner, NativeRunner)):
        raise RequestError(f"a {type(target).__name__} cannot leave its model early", field="layers")
    depth = target.model.config.num_hidden_layers
    if not 1 <= layers < depth:
        raise RequestError(f"an early exit of {depth} layers is after 1 to {depth - 1}, got {layers}", field="layers")
    return TorchExitRunner(target, layers) if isinstance(target, TorchRunner) else NativeExitRunner(target, layers)


class TorchExitRunner(TorchRunner):
    """The first layers of a TorchRunner."""

    def __init__(self, target: TorchRunner, layers: int) -> None:
        self.__dict__.update(target.__dict__)
        self.layers = layers

    @torch.inference_mode()
    def hidden_states(self, ids: Sequence[int], chunks: Sequence[Chunk]) -> Tensor:
        """See `Runner.hidden_states`."""
        self.cache.plan(chunks)
        places = [position for chunk in chunks for position in range(chunk.start, chunk.start + chunk.length)]
        positions = torch.tensor(places, device=self.device)
        x = self.model.embed(torch.tensor(ids, device=self.device), positions)
        step = self.model.step(positions, self.cache, x.dtype)
        for layer, block in enumerate(self.model.order[: self.layers]):
            x = self.model.layers[block](x, step, layer)
        hidden: Tensor = self.model.norm(x)
        return hidden


class NativeExitRunner(NativeRunner):
    """The first layers of a NativeRunner: a second stack over the same packed weights, keys and values."""

    def __init__(self, target: NativeRunner, layers: int) -> None:
        self.__dict__.update(target.__dict__)
        struct = DecoderStruct.from_buffer_copy(target.decoder.struct)
        struct.layer_count = layers
        self.decoder = replace(target.decoder, struct=struct)  # which holds on to all that the struct points to
        self._stack = self._library.gristmill_stack(ctypes.byref(struct), torch.get_num_threads())
        self._states, self._scores = torch.empty(0, self.config.hidden_size), torch.empty(0, self.config.vocab_size)


class EarlyExitProposer:
    """Drafts with the first `layers` layers of the target itself.

    Raises RequestError as `exit_runner` does, and for max_tokens below 1.
    """

    def __init__(self, target: Runner, *, layers: int, max_tokens: int = 4) -> None:
        if max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {max_tokens}", field="max_tokens")
        self.runner, self.max_tokens = exit_runner(target, layers), max_tokens
        runner = self.runner
        self._block_size = runner.cache.block_size if isinstance(runner, TorchRunner) else runner.block_size
        self._config = runner.model.config

    def propose(self, requests: Sequence[DraftRequest]) -> list[Draft]:
        """See `Proposer.propose`. One forward per drafted token, for all requests together."""
        draftings: dict[int, Drafting] = {}
        for number, request in enumerate(requests):
            limit = longest_draft(request, self._block_size, self._config.context)
            if min(limit, self.max_tokens) > 0:
                draftings[number] = Drafting(request, len(request.token_ids) - 1, min(limit, self.max_tokens))
        size = self._config.vocab_size
        roll_out(self.runner, list(draftings.values()), vocab_size=size, most=max(1, len(draftings)))
        return [draftings[number].draft if number in draftings else Draft([]) for number in range(len(requests))]

    def forget(self, slot: int) -> None:
        """See `Proposer.forget`: nothing is kept."""
