"""A model split over two processes computes what one computes; a process that is gone is an error, not a wait."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine import helpers
from gristmill.core import SamplingParams
from gristmill.engine.engine import Engine, RunnerFactory
from gristmill.engine.memory.paged_cache import Chunk
from gristmill.engine.parallel.expert import ExpertPart
from gristmill.engine.parallel.group import Order, Part, Ranks, join, lead, serve_rank
from gristmill.engine.parallel.pipeline import PipelinePart
from gristmill.engine.parallel.tensor import TensorPart
from gristmill.engine.runner import Runner, TorchRunner
from gristmill.errors import GristmillError
from gristmill.model import moe
from gristmill.model.config import FeedForwardConfig, LayerConfig, MoEConfig
from gristmill.model.transformer import Transformer
from model import tiny
from train.parallel.small import EVERYTHING
from train.parallel.spawn import read, together, write

PARTS: dict[str, Callable[[Transformer, Ranks], Part]] = {
    "tensor": TensorPart,
    "pipeline": PipelinePart,
    "expert": ExpertPart,
}
MOE = MoEConfig(num_experts=4, top_k=2, intermediate_size=24, scoring="sigmoid", correction_bias=True)
WINDOW = LayerConfig(window=6)
MODELS: dict[str, tuple[str, Callable[[], Transformer]]] = {
    "tensor": ("tensor", tiny.model),
    "tensor, all features": ("tensor", lambda: seeded(Transformer(replace(EVERYTHING, vocab_size=300)))),
    "pipeline": ("pipeline", tiny.model),
    "pipeline, windows and shared keys": (
        "pipeline",
        lambda: tiny.model(
            layers=(LayerConfig(), WINDOW, WINDOW, replace(WINDOW, keys_from=2)),
            num_hidden_layers=4,
            tie_word_embeddings=False,
        ),
    ),
    "expert": ("expert", lambda: lopsided(tiny.model(feed_forward=FeedForwardConfig(moe=MOE)))),
}
PROMPTS = [helpers.prompt(length, seed) for seed, length in enumerate((3, 21, 34))]
REQUESTS = [
    (PROMPTS[0], helpers.greedy()),
    (PROMPTS[1], SamplingParams(temperature=1.0, seed=3, max_tokens=8, ignore_eos=True, n=3)),
    (PROMPTS[2], helpers.greedy(logprobs=2)),
]


def seeded(model: Transformer) -> Transformer:
    model.initialise(0)
    return model.eval()


def lopsided(model: Transformer) -> Transformer:
    """Expert 3 gets no tokens."""
    for part in model.modules():
        if isinstance(part, moe.Router):
            assert part.correction_bias is not None
            part.correction_bias += torch.tensor((0.0, 0.0, 0.0, -50.0))
    return model


def results(model: Transformer, runner: RunnerFactory) -> dict[str, Any]:
    """Logits of prompts in two chunks each, what blocks hold then, and what an engine answers."""
    direct: Runner = runner(16, 4)
    tables, logits = [list(range(15, 6, -1)), [0, 3, 1, 2, 4, 5]], []
    for begin, end in ((0, 13), (13, 14), (14, 21)):
        ids = PROMPTS[2][begin:end] + PROMPTS[1][begin:end]
        hidden = direct.hidden_states(ids, [Chunk(table, begin, end - begin) for table in tables])
        logits.append(direct.logits(hidden))
    held = [x[:, :21].clone() for x in direct.read_blocks(tables[1])]
    direct.copy_blocks([(0, 6)])
    copied = direct.read_blocks([6])
    direct.write_blocks([14, 6], [x[:, : 2 * 4] for x in held])
    back = direct.read_blocks([14, 6])
    engine = Engine(model, helpers.tokenizer(), kv_cache_tokens=160, max_num_batched_tokens=24, runner=runner)
    outputs = helpers.run(engine, REQUESTS) if model.config.vocab_size == helpers.VOCABULARY else []
    tokens = [completion.token_ids for output in outputs for completion in output.outputs]
    found = {"logits": torch.cat(logits), "bytes": direct.kv_bytes_per_token, "tokens": tokens}
    return found | {
        f"{name}{i}": x for name, xs in (("held", held), ("copied", copied), ("back", back)) for i, x in enumerate(xs)
    }


def work(directory: Path) -> None:
    ranks = join("cpu", timeout=200)
    for name, (kind, make) in MODELS.items():
        experts = _Experts() if kind == "expert" else None
        model = make()
        part = PARTS[kind](model, ranks)
        found: dict[str, Any] = {}
        if ranks.rank:
            serve_rank(part)
        else:
            with lead(part) as runner:
                found = results(model, runner)
        if experts is not None:
            found |= {"rows": experts.rows, "calls": experts.calls}
        found["weights"] = sum(p.numel() for p in model.parameters())
        write(directory / f"{name}.{ranks.rank}", found)
    dist.destroy_process_group()


class _Experts:
    """Counts what the experts of this process compute."""

    def __init__(self) -> None:
        self.rows, self.calls, self._whole = 0, 0, moe._expert
        moe._expert = self

    def __call__(self, rows: torch.Tensor, *weights: Any) -> torch.Tensor:
        assert len(rows), "an expert without tokens ran"
        self.rows, self.calls = self.rows + len(rows), self.calls + 1
        return self._whole(rows, *weights)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    together(work, 2, directory)
    return directory


def alone(model: Transformer) -> dict[str, Any]:
    def runner(num_blocks: int, block_size: int) -> Runner:
        return TorchRunner(model, num_blocks=num_blocks, block_size=block_size, kv_dtype=torch.float32)

    return results(model, runner)


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_compute_what_one_does(runs: Path, name: str) -> None:
    found, expected = read(runs / f"{name}.0"), alone(MODELS[name][1]())
    assert found["tokens"] == expected["tokens"]
    assert found["bytes"] == expected["bytes"]
    tolerance = 1e-5 if MODELS[name][0] == "expert" else 1e-4
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[key], value, rtol=0, atol=tolerance, msg=lambda told, k=key: k + told)


@pytest.mark.parametrize("name", MODELS)
def test_each_process_holds_a_part(runs: Path, name: str) -> None:
    whole = sum(parameter.numel() for parameter in MODELS[name][1]().parameters())
    parts = [read(runs / f"{name}.{rank}")["weights"] for rank in range(2)]
    assert max(parts) < whole
    assert sum(parts) >= whole


def test_an_expert_computes_the_tokens_that_chose_it_and_no_others(runs: Path) -> None:
    model = MODELS["expert"][1]()
    routed = torch.zeros(4, dtype=torch.long)

    def count(_router: Any, _given: Any, routing: moe.Routing) -> None:
        routed.add_(routing.counts())

    for part in model.modules():
        if isinstance(part, moe.Router):
            part.register_forward_hook(count)
    with torch.no_grad():
        alone(model)
    rows = [read(runs / f"expert.{rank}")["rows"] for rank in range(2)]
    assert routed[3] == 0
    assert rows == [routed[:2].sum(), routed[2:].sum()]
    tokens = int(routed.sum()) // MOE.top_k
    assert sum(rows) == tokens * MOE.top_k
    assert tokens % model.config.num_hidden_layers == 0


def broken(directory: Path, how: str) -> None:
    """Rank 1 leaves, or falls silent, when it hears of the first step."""
    ranks = join("cpu", timeout=2)
    part = TensorPart(tiny.model(), ranks)
    done = directory / f"{how}.0"
    if how == "leader":
        if ranks.rank == 0:
            os._exit(0)
        with pytest.raises(GristmillError, match="another process is gone"):
            serve_rank(part)
        write(directory / "leader.1", {})
    elif ranks.rank:
        _, (num_blocks, block_size, _) = ranks.hear()
        part.allocate(num_blocks, block_size, torch.float32)
        assert ranks.hear()[0] is Order.STEP
        while how == "silent" and not done.exists():
            time.sleep(0.1)
    else:
        with lead(part) as runner:
            direct = runner(8, 4)
            for _ in range(2):
                with pytest.raises(GristmillError, match="start all of them again"):
                    direct.hidden_states([3, 4], [Chunk([0], 0, 2)])
        write(done, {})
    os._exit(0)


@pytest.mark.parametrize("how", ["dead", "silent", "leader"])
def test_a_process_that_is_gone_is_an_error(tmp_path: Path, how: str) -> None:
    together(broken, 2, tmp_path, how)
    assert list(tmp_path.iterdir()), "the other one did not notice"


def test_what_cannot_be_split_is_refused_by_name() -> None:
    ranks = Ranks(0, 3, torch.device("cpu"), None, None)  # type: ignore[arg-type]
    with pytest.raises(GristmillError, match="num_attention_heads"):
        TensorPart(tiny.model(), ranks)
    with pytest.raises(GristmillError, match="mixture"):
        ExpertPart(tiny.model(), ranks)
    with pytest.raises(GristmillError, match="more than the model's 3 layers"):
        PipelinePart(tiny.model(), replace(ranks, size=4))
    shared = tiny.model(layers=(LayerConfig(), WINDOW, replace(WINDOW, keys_from=1)))
    with pytest.raises(GristmillError, match="keys_from"):
        PipelinePart(shared, replace(ranks, size=3))


def test_joining_needs_the_environment_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(GristmillError, match="torchrun"):
        join("cpu")
