"""What every family of decoder checkpoints owes its twin in transformers.

A test class inherits `DecoderFamilySuite` and gives a fixture `twin`: a tiny random transformers model, made with
`randomise` so that each token's logits stand well apart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gristmill.engine.memory.paged_cache import Chunk, PagedKVCache
from gristmill.errors import CheckpointError
from gristmill.model.formats import huggingface
from gristmill.model.formats.family import Family
from gristmill.model.formats.huggingface import load_huggingface, read_config, save_huggingface
from gristmill.model.memory import SequenceCache
from gristmill.model.transformer import Transformer

BLOCK_SIZE = 16
LENGTH = 40
ATOL = 1e-4


def randomise(model: Any, seed: int = 0) -> Any:
    """Weights large enough that a wrong norm, bias or position shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def token_ids(model: Any, rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    """Random ids (rows, length), never a padding or special id."""
    return torch.randint(5, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


class DecoderFamilySuite:
    """Equality in both directions, with and without caches, and refusals by name."""

    exact_config = True
    family: Family | None = None
    """Written as this family, where an earlier one in the order of preference could hold the model too."""

    @pytest.fixture(autouse=True)
    def _written_as(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if self.family is not None:
            monkeypatch.setattr(huggingface, "FAMILIES", (self.family,))

    @pytest.fixture
    def saved(self, twin: Any, tmp_path: Path) -> Path:
        twin.save_pretrained(tmp_path / "theirs")
        return tmp_path / "theirs"

    @pytest.fixture
    def model(self, saved: Path) -> Transformer:
        found = load_huggingface(saved, torch.float32)
        assert isinstance(found, Transformer)
        return found.eval()

    @torch.inference_mode()
    def test_logits_are_those_of_the_twin(self, twin: Any, model: Transformer) -> None:
        ids = token_ids(twin)
        theirs = twin(ids).logits
        assert (model(ids) - theirs).abs().max() < ATOL
        assert theirs.std() > 100 * ATOL

    @torch.inference_mode()
    def test_what_we_write_computes_the_same_there(self, twin: Any, model: Transformer, tmp_path: Path) -> None:
        save_huggingface(model, tmp_path / "ours")
        config = json.loads((tmp_path / "ours/config.json").read_text())
        _, _, back = read_config(config, "ours")
        assert back == model.config
        import transformers

        other = getattr(transformers, config["architectures"][0]).from_pretrained(tmp_path / "ours").eval()
        ids = token_ids(twin)
        assert (other(ids).logits - twin(ids).logits).abs().max() < ATOL

    @torch.inference_mode()
    def test_padding_changes_nothing(self, twin: Any, model: Transformer) -> None:
        ids = token_ids(twin, rows=1, length=12)
        padded = torch.cat((ids, torch.full((1, 5), 3)), dim=1)
        mask = torch.cat((torch.ones_like(ids), torch.zeros(1, 5, dtype=torch.long)), dim=1)
        theirs = twin(padded, attention_mask=mask).logits[:, :12]
        assert (model(ids) - theirs).abs().max() < ATOL
        assert (model(padded)[:, :12] - theirs).abs().max() < ATOL

    @torch.inference_mode()
    def test_caches_give_what_one_pass_gives(self, twin: Any, model: Transformer) -> None:
        ids = token_ids(twin, rows=1)[0]
        expected = twin(ids[None]).logits[0]
        plain = SequenceCache(model.config)
        paged = PagedKVCache(model.config, -(-LENGTH // BLOCK_SIZE) + 1, BLOCK_SIZE, torch.float32, torch.device("cpu"))
        table = list(range(-(-LENGTH // BLOCK_SIZE) + 1))[::-1]
        assert BLOCK_SIZE < LENGTH
        begin = 0
        for count in (7, 1, 1, 20, 1, 1, 9):
            part, positions = ids[begin : begin + count], torch.arange(begin, begin + count)
            plain.extend(count)
            paged.plan([Chunk(table, begin, count)])
            for cache in (plain, paged):
                found = model.logits(model.hidden_states(part, positions, cache))
                assert (found - expected[begin : begin + count]).abs().max() < ATOL
            begin += count
        assert begin == LENGTH

    @torch.inference_mode()
    def test_greedy_tokens_are_those_of_generate(self, twin: Any, model: Transformer) -> None:
        prompt = token_ids(twin, rows=1, length=6)
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        theirs = twin.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0].tolist()
        ours = prompt[0].tolist()
        cache = SequenceCache(model.config)
        part = prompt[0]
        for _ in range(12):
            positions = cache.extend(len(part))
            part = model.logits(model.hidden_states(part, positions, cache))[-1:].argmax(dim=-1)
            ours.append(int(part))
        assert ours == theirs

    def test_parameters_count_as_there(self, twin: Any, model: Transformer) -> None:
        assert model.count_parameters() == twin.num_parameters()

    def test_tensors_that_do_not_fit_are_refused_by_name(self, saved: Path) -> None:
        file = saved / "model.safetensors"
        tensors = load_file(file)
        victim = next(name for name in sorted(tensors) if "norm" in name or "ln" in name)
        save_file({name: value for name, value in tensors.items() if name != victim}, file)
        with pytest.raises(CheckpointError, match=f"missing: .*{victim}"):
            load_huggingface(saved, torch.float32)
        save_file(tensors | {"model.surplus.weight": torch.zeros(2)}, file)
        with pytest.raises(CheckpointError, match=r"no place in this configuration: model\.surplus\.weight"):
            load_huggingface(saved, torch.float32)
        save_file(tensors | {victim: torch.zeros(3)}, file)
        with pytest.raises(CheckpointError, match=f"tensor {victim} has shape"):
            load_huggingface(saved, torch.float32)

    def test_an_unknown_flag_is_refused_by_name(self, saved: Path) -> None:
        path = saved / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"use_clever_trick": True}))
        with pytest.raises(CheckpointError, match="use_clever_trick = True"):
            load_huggingface(saved, torch.float32)
