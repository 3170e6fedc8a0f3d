"""What layers and heads share: key heads, keys and values of another layer, its attention weights, all its weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gristmill.core import CAUSAL, AttentionRule
from gristmill.engine.memory.paged_cache import Chunk, PagedKVCache
from gristmill.errors import CheckpointError
from gristmill.model.attention.packed import PackedAttention
from gristmill.model.config import LayerConfig, ModelConfig
from gristmill.model.formats.huggingface import load_huggingface
from gristmill.model.memory import SequenceCache
from gristmill.model.transformer import Transformer
from model import tiny

BLOCK_SIZE = 16
LENGTH, LAYERS = 20, 4


def shared_keys(factor: int) -> tuple[LayerConfig, ...]:
    """Each group of `factor` neighbours uses the keys and values of its first layer."""
    firsts = [layer - layer % factor for layer in range(LAYERS)]
    return tuple(LayerConfig(keys_from=None if first == layer else first) for layer, first in enumerate(firsts))


def paged(config: ModelConfig) -> PagedKVCache:
    return PagedKVCache(config, -(-LENGTH // BLOCK_SIZE), BLOCK_SIZE, torch.float32, torch.device("cpu"))


def nbytes(cache: PagedKVCache) -> int:
    return sum(x.numel() * x.element_size() for x in (cache.keys, cache.values))


@torch.inference_mode()
def step_by_step(model: Transformer, tokens: Tensor) -> tuple[Tensor, Tensor, SequenceCache, PagedKVCache]:
    """Logits (tokens, vocabulary) through both memories, in steps of several tokens and of one."""
    plain, pages = SequenceCache(model.config), paged(model.config)
    table, begin = list(range(-(-LENGTH // BLOCK_SIZE)))[::-1], 0
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for count in (6, 1, 1, 9, 1, 2):
        part, positions = tokens[begin : begin + count], plain.extend(count)
        pages.plan([Chunk(table, begin, count)])
        found[0].append(model.logits(model.hidden_states(part, positions, plain)))
        found[1].append(model.logits(model.hidden_states(part, positions, pages)))
        begin += count
    return torch.cat(found[0]), torch.cat(found[1]), plain, pages


class Recorder(PackedAttention):
    """Keeps what each layer attends with."""

    def __init__(self, tokens: int) -> None:
        super().__init__([tokens])
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule = CAUSAL) -> Tensor:
        self.seen.append((query, key, value))
        return super().attend(layer, query, key, value, rule)

    def weights(self, step: int) -> Tensor:
        """(heads, queries, keys) of the layer that came so many-th."""
        query, key, _ = self.seen[step]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights: Tensor = scores.masked_fill(later, float("-inf")).softmax(dim=-1)
        return weights


@torch.inference_mode()
def recorded(model: Transformer, tokens: Tensor) -> Recorder:
    recorder = Recorder(len(tokens))
    model.hidden_states(tokens, None, recorder)
    return recorder


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_keys_of_another_layer_divide_the_memory_by_the_sharing_factor(factor: int) -> None:
    model = tiny.model(num_hidden_layers=LAYERS, layers=shared_keys(factor))
    baseline = tiny.model(num_hidden_layers=LAYERS)
    tokens = tiny.ids(LENGTH)
    *found, plain, pages = step_by_step(model, tokens)
    *_, plain_before, pages_before = step_by_step(baseline, tokens)
    assert plain.nbytes() * factor == plain_before.nbytes()
    assert nbytes(pages) * factor == nbytes(pages_before)
    with torch.inference_mode():
        whole, other = model(tokens), baseline(tokens)
    for logits in found:
        assert (logits - whole).abs().max() < 1e-4
    assert torch.equal(whole, other) == (factor == 1)
    missing = 2 * baseline.config.key_value_size * baseline.config.hidden_size * (LAYERS - LAYERS // factor)
    assert model.count_parameters() == baseline.count_parameters() - missing


def test_a_layer_with_the_keys_of_another_has_queries_of_its_own() -> None:
    seen = recorded(tiny.model(num_hidden_layers=LAYERS, layers=shared_keys(2)), tiny.ids(LENGTH)).seen
    for first, second in ((0, 1), (2, 3)):
        assert torch.equal(seen[first][1], seen[second][1])
        assert torch.equal(seen[first][2], seen[second][2])
        assert not torch.equal(seen[first][0], seen[second][0])
    assert not torch.equal(seen[0][1], seen[2][1])


def test_attention_weights_of_another_layer_are_the_same_bits() -> None:
    layers = (LayerConfig(), LayerConfig(scores_from=0), LayerConfig(), LayerConfig(scores_from=0))
    model, tokens = tiny.model(num_hidden_layers=LAYERS, layers=layers), tiny.ids(LENGTH)
    recorder = recorded(model, tokens)
    for layer in (1, 3):
        assert torch.equal(recorder.weights(0), recorder.weights(layer))
        assert not torch.equal(recorder.seen[0][2], recorder.seen[layer][2])
    assert not torch.equal(recorder.weights(0), recorder.weights(2))
    with torch.inference_mode():
        whole = model(tokens)
    for logits in step_by_step(model, tokens)[:2]:
        assert (logits - whole).abs().max() < 1e-4
    saved = (model.config.query_size + model.config.key_value_size) * model.config.hidden_size * 2
    assert model.count_parameters() == tiny.model(num_hidden_layers=LAYERS).count_parameters() - saved


def one_block(layers: int) -> tuple[LayerConfig, ...]:
    return tuple(LayerConfig(weights_from=0 if layer else None) for layer in range(layers))


def test_one_block_for_all_layers_has_as_many_parameters_at_any_depth() -> None:
    counts = {
        tiny.model(num_hidden_layers=layers, layers=one_block(layers)).count_parameters() for layers in (1, 2, 3, 12)
    }
    assert counts == {tiny.model(num_hidden_layers=1).count_parameters()}


@torch.inference_mode()
def test_one_block_for_all_layers_is_a_stack_of_equal_copies() -> None:
    shared = tiny.model(num_hidden_layers=LAYERS, layers=one_block(LAYERS))
    copies, tokens = tiny.model(seed=9, num_hidden_layers=LAYERS), tiny.ids(LENGTH)
    for layer in range(LAYERS):
        copies.layers[layer].load_state_dict(shared.layers[0].state_dict())
    for name in ("embed_tokens", "norm"):
        copies.get_submodule(name).load_state_dict(shared.get_submodule(name).state_dict())
    whole = shared(tokens)
    assert torch.equal(whole, copies(tokens))
    *found, plain, _ = step_by_step(shared, tokens)
    for logits in found:
        assert (logits - whole).abs().max() < 1e-4
    assert plain.nbytes() == step_by_step(copies, tokens)[2].nbytes()  # weights are shared, keys and values are not


@pytest.mark.parametrize("field", ["keys_from", "scores_from", "weights_from"])
@pytest.mark.parametrize("source", [1, 2, -1])
def test_only_an_earlier_layer_can_be_shared(field: str, source: int) -> None:
    entry = replace(LayerConfig(), **{field: source})  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=rf"layers\[1\]\.{field} must name an earlier layer, got {source}"):
        tiny.config(layers=(LayerConfig(), entry, LayerConfig()))


def test_key_heads_must_divide_query_heads() -> None:
    with pytest.raises(CheckpointError, match=r"num_attention_heads \(4\) must be a multiple of .* \(3\)"):
        tiny.config(num_key_value_heads=3)


@pytest.mark.parametrize("groups", [1, 2])
@torch.inference_mode()
def test_fewer_key_heads_equal_multi_head_attention_with_copies(groups: int) -> None:
    """Query head j reads key head j * groups / heads, down to one head for all (multi-query attention)."""
    model = tiny.model(num_key_value_heads=groups)
    full, config = tiny.model(seed=9, num_key_value_heads=4), model.config
    state = model.state_dict()
    sizes = (config.query_size, config.key_value_size, config.key_value_size)
    for name in [name for name in state if name.endswith("qkv_proj.weight")]:
        query, *others = state[name].split(sizes)
        copies = [
            x.view(groups, config.head_dim, -1).repeat_interleave(4 // groups, dim=0).flatten(0, 1) for x in others
        ]
        state[name] = torch.cat((query, *copies))
    full.load_state_dict(state)
    tokens = tiny.ids(LENGTH)
    assert (model(tokens) - full(tokens)).abs().max() < 1e-4


@pytest.mark.peer
@pytest.mark.parametrize("groups", [1, 2, 4])
@torch.inference_mode()
def test_any_number_of_key_heads_equals_transformers(groups: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=groups, initializer_range=0.3)
    twin = transformers.LlamaForCausalLM(config).eval()
    twin.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_key_value_heads"] == groups
    model, tokens = load_huggingface(tmp_path, torch.float32), tiny.ids(LENGTH, vocab_size=61)
    assert isinstance(model, Transformer)
    assert (model(tokens) - twin(tokens[None]).logits[0]).abs().max() < 1e-4
