"""A real model with adapters beside itself: PEFT's logits and transformers' tokens, on every path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gristmill import assets
from gristmill.core import SamplingParams
from gristmill.engine.llm import LLM
from gristmill.model.load import load_model
from gristmill.model.lora.low_rank import applied
from gristmill.model.lora.peft import read_lora

MODEL = "smollm2-135m"
PROMPTS = ["The water mill", "def sort(items):", "Once upon a time", "Photosynthesis is"]
SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "all": {"r": 16, "lora_alpha": 16, "target_modules": "all-linear", "use_rslora": True},
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """PEFT's model with two random adapters, and the folder where they are saved by name."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    path, folder = assets.get(MODEL), tmp_path_factory.mktemp("adapters")
    base = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model, generator = None, torch.Generator().manual_seed(0)
    for name, settings in SETTINGS.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.03
    model.save_pretrained(folder)
    return model.eval(), folder


@torch.no_grad()
def logits(model: Any, adapter: str | None, ids: list[int]) -> torch.Tensor:
    """PEFT's, of all tokens."""
    if adapter is None:
        with model.disable_adapter():
            return model(torch.tensor([ids])).logits[0]
    model.set_adapter(adapter)
    return model(torch.tensor([ids])).logits[0]


@pytest.mark.asset
@pytest.mark.peer
@pytest.mark.timeout(600)
def test_logits_are_those_of_peft(theirs: Any) -> None:
    model, folder = theirs
    ours, tokenizer = load_model(MODEL)[:2]
    for name in SETTINGS:
        lora = read_lora(folder / name, ours.config)
        for text in PROMPTS[:2]:
            ids = tokenizer.encode(text)
            with torch.no_grad(), applied(ours, [(slice(None), lora)]):
                found = ours(torch.tensor(ids))
            torch.testing.assert_close(found, logits(model, name, ids), rtol=1e-5, atol=1e-4)


@pytest.mark.asset
@pytest.mark.peer
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("fast", "tokens"), [(True, 24), (False, 5)], ids=["native", "PyTorch"])
def test_each_request_of_a_mixed_batch_says_what_peft_says(theirs: Any, fast: bool, tokens: int) -> None:
    """Each token is PEFT's most probable one, or as good as that."""
    model, folder = theirs
    llm = LLM(MODEL, fast_kernels=fast, kv_cache_tokens=2048)
    assert llm.path.startswith("native") == fast
    for name in SETTINGS:
        llm.load_adapter(name, folder / name)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    asked = {
        llm.engine.add(text, params, adapter=name): (llm.tokenizer.encode(text), name)
        for text in PROMPTS[: tokens // 5]
        for name in (*SETTINGS, None)
    }
    said = {}
    while llm.engine.has_unfinished():
        said |= {output.request_id: output.outputs[0].token_ids for output in llm.engine.step() if output.finished}
    for request, (prompt, name) in asked.items():
        rows = logits(model, name, prompt + said[request])[len(prompt) - 1 : -1]
        chosen = rows.gather(1, torch.tensor(said[request])[:, None])[:, 0]
        assert float((rows.amax(-1) - chosen).max()) < 1e-4
        score = llm.score(prompt, said[request], adapter=name)
        expected = chosen - rows.logsumexp(-1)
        torch.testing.assert_close(torch.tensor(score.token_logprobs), expected, rtol=1e-4, atol=1e-4)
    assert len(set(map(tuple, said.values()))) >= len(asked) * 2 // 3  # the weak adapter may agree with none
