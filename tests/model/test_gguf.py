"""GGUF files: our own small ones, broken and hostile ones, and the real SmolLM2."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from gristmill import assets
from gristmill.core import SamplingParams
from gristmill.engine.engine import Engine
from gristmill.errors import CheckpointError
from gristmill.model.formats.gguf_file import load_gguf, load_gguf_tokenizer
from gristmill.model.load import load_model, load_tokenizer
from gristmill.model.transformer import Transformer
from gristmill.tokens.tokenizer import Tokenizer
from model import gguf_files, tiny


def load(path: Path) -> Transformer:
    return load_gguf(path, torch.float32)[0]


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    for word in (*words, str(path)):
        assert word in str(caught.value)


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": False, "num_key_value_heads": 4, "head_dim": 12}])
def test_a_written_file_loads_with_equal_weights(tmp_path: Path, shape: dict[str, Any]) -> None:
    model = tiny.model(**shape)
    loaded, tokenizer = load_model(gguf_files.whole(tmp_path / "tiny.gguf", model))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    tokens = tiny.ids(20)
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.config.head_dim == model.config.head_dim
    assert loaded.config.rope_theta == model.config.rope_theta
    assert tokenizer.vocab_size == model.config.vocab_size


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantised_tensors_are_expanded(tmp_path: Path, kind: str) -> None:
    quantised = gguf.GGMLQuantizationType[kind]
    model = tiny.model(hidden_size=64, num_key_value_heads=4, intermediate_size=96, head_dim=16)
    fields = gguf_files.metadata(model, gguf_files.tokenizer())
    weights = gguf_files.tensors(model)
    loaded = load(gguf_files.write(tmp_path / "tiny.gguf", fields, weights, quantised))
    expected = gguf_files.dequantised(weights["token_embd.weight"], quantised)
    assert torch.equal(loaded.embed_tokens.weight, expected)
    exact = model.layers[0].self_attn.qkv_proj.weight  # type: ignore[union-attr]
    found = loaded.layers[0].self_attn.qkv_proj.weight  # type: ignore[union-attr]
    assert torch.allclose(found, exact, atol=0.1)  # type: ignore[arg-type]


def test_the_tokenizer_comes_back(tmp_path: Path) -> None:
    model, expected = tiny.model(), gguf_files.tokenizer()
    found = load_tokenizer(gguf_files.whole(tmp_path / "tiny.gguf", model))
    assert isinstance(found, Tokenizer)
    for text in [*gguf_files.CORPUS, "12345 <|im_start|>user\nhi<|im_end|>", "emoji 😀 and\ttabs\n\n\n"]:
        assert found.encode(text) == expected.encode(text)
        assert found.decode(found.encode(text), skip_special_tokens=False) == text
    for name in ("bos_token_id", "eos_token_id", "stop_token_ids", "chat_template", "special_tokens"):
        assert getattr(found, name) == getattr(expected, name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general__architecture": "gpt2"}, ["gpt2", "llama"]),
        ({"general__architecture": None}, ["general.architecture", "missing"]),
        ({"general__architecture": 7}, ["general.architecture", "str"]),
        ({"llama__rope__scaling__type": "yarn"}, ["yarn"]),
        ({"llama__rope__dimension_count": 8}, ["8 of 16"]),
        ({"llama__context_length": None}, ["llama.context_length"]),
        ({"llama__attention__head_count": 0}, ["num_attention_heads"]),
        ({"llama__attention__head_count": [4, 4, 4]}, ["llama.attention.head_count"]),
        ({"llama__embedding_length": "48"}, ["llama.embedding_length"]),
        ({"llama__embedding_length": 96}, ["shape"]),
        ({"llama__attention__head_count": 6}, ["attn_q"]),
        ({"llama__block_count": 4_000_000_000}, ["4000000000 layers"]),
        ({"llama__block_count": 2}, ["model.layers.2"]),
        ({"llama__attention__layer_norm_rms_epsilon": -1.0}, ["rms_norm_eps"]),
        ({"tokenizer__ggml__model": "llama"}, ["tokenizer.ggml.model", "gpt2"]),
        ({"tokenizer__ggml__pre": "viking"}, ["tokenizer.ggml.pre", "viking"]),
        ({"tokenizer__ggml__tokens": "abc"}, ["tokenizer.ggml.tokens"]),
        ({"tokenizer__ggml__tokens": [1, 2, 3]}, ["tokenizer.ggml.tokens"]),
        ({"tokenizer__ggml__tokens": ["a", "a"]}, ["tokenizer.ggml.tokens has 2 entries, 1"]),
        ({"tokenizer__ggml__token_type": [1, 1]}, ["tokenizer.ggml.token_type 2"]),
        ({"tokenizer__ggml__merges": ["nospace"]}, ["tokenizer.ggml.merges"]),
        ({"tokenizer__ggml__merges": ["no such"]}, ["tokenizer.ggml.merges"]),
        ({"tokenizer__ggml__bos_token_id": 10**6}, ["tokenizer.ggml.bos_token_id", "1000000"]),
    ],
    ids=str,
)
def test_metadata_we_do_not_build_is_refused(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    refused(gguf_files.whole(tmp_path / "tiny.gguf", tiny.model(), **changes), *words)


def test_tensors_without_a_place_are_named(tmp_path: Path) -> None:
    model = tiny.model()
    fields = gguf_files.metadata(model, gguf_files.tokenizer())
    for name in ("rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate_exps.weight", "other"):
        weights = {**gguf_files.tensors(model), name: np.ones(8, np.float32)}
        refused(gguf_files.write(tmp_path / "tiny.gguf", fields, weights))
    weights = gguf_files.tensors(model)
    del weights["blk.1.attn_v.weight"]
    refused(
        gguf_files.write(tmp_path / "tiny.gguf", fields, weights), "missing: model.layers.1.self_attn.v_proj.weight"
    )
    weights["blk.1.attn_v.weight"] = np.ones((32, 48), np.int8)
    refused(gguf_files.write(tmp_path / "tiny.gguf", fields, weights), "blk.1.attn_v.weight")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = gguf_files.whole(tmp_path / "tiny.gguf", tiny.model())
    content = path.read_bytes()
    cuts = {0, 1, 4, 8, 23, 24, 31, 100, len(content) // 2, len(content) - 1}
    cuts |= set(random.Random(0).sample(range(len(content)), 30))
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        refused(path, "GGUF")


def head(*parts: bytes, tensors: int = 0, fields: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + b"".join(parts)


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


HUGE = (1 << 63) - 1
HOSTILE = {
    "not a gguf": b"hello world, this is no model",
    "another version": b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
    "many fields": head(fields=HUGE),
    "many tensors": head(tensors=HUGE, fields=0),
    "long key": head(text(b"general.architecture", HUGE)),
    "long string": head(text(b"a"), struct.pack("<I", 8), text(b"b", HUGE)),
    "long array of bytes": head(text(b"a"), struct.pack("<IIQ", 9, 0, HUGE)),
    "long array of strings": head(text(b"a"), struct.pack("<IIQ", 9, 8, HUGE)),
    "array longer than the file": head(text(b"a"), struct.pack("<IIQ", 9, 4, 1 << 22)),
    "deep arrays": head(text(b"a"), struct.pack("<I", 9), struct.pack("<IQ", 9, 1) * 5000),
    "unknown type": head(text(b"a"), struct.pack("<I", 99)),
    "tensor of many dimensions": head(text(b"t"), struct.pack("<I", (1 << 32) - 1), tensors=1, fields=0),
    "tensor beyond the file": head(text(b"t"), struct.pack("<IQQIQ", 2, 1 << 20, 1 << 20, 0, 0), tensors=1, fields=0),
    "tensor whose size wraps round": head(
        text(b"t"), struct.pack("<IQQIQ", 2, 1 << 32, 1 << 32, 0, 0), tensors=1, fields=0
    ),
    "tensor far away": head(text(b"t"), struct.pack("<IQIQ", 1, 1, 0, HUGE), tensors=1, fields=0),
    "architecture not utf-8": head(text(b"general.architecture"), struct.pack("<I", 8), text(b"\xff\xfe")),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
@pytest.mark.timeout(20)
def test_a_hostile_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[name] + bytes(64))
    refused(path)
    with pytest.raises(CheckpointError):
        load_gguf_tokenizer(path)


def test_flipped_bytes_give_a_model_or_a_refusal(tmp_path: Path) -> None:
    path = gguf_files.whole(tmp_path / "tiny.gguf", tiny.model())
    content = path.read_bytes()
    choose = random.Random(1)
    refusals = []
    for _ in range(60):
        place = choose.randrange(12_000)  # metadata and tensor names
        path.write_bytes(content[:place] + bytes([choose.randrange(256)]) + content[place + 1 :])
        try:
            load(path)
        except CheckpointError as error:
            refusals.append(str(error))
    assert refusals
    assert all(str(path) in refusal for refusal in refusals)


@pytest.fixture(scope="module")
def smollm2() -> tuple[Transformer, Tokenizer]:
    return load_model("smollm2-135m")


@pytest.fixture(scope="module")
def theirs() -> Any:
    transformers = pytest.importorskip("transformers")
    path = assets.get("smollm2-135m")
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


PROMPTS = [
    "The capital of France is",
    "<|im_start|>user\nName three grains that are milled.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n",
]
LONG = "The miller opened the sluice at dawn, and the great wheel began to turn. " * 20


@pytest.mark.asset
@pytest.mark.peer
@torch.inference_mode()
def test_smollm2_logits_equal_transformers(smollm2: tuple[Transformer, Tokenizer], theirs: Any) -> None:
    model, tokenizer = smollm2
    tokens = torch.tensor([tokenizer.encode(LONG)[:200]])
    assert tokens.shape == (1, 200)
    assert float((model(tokens) - theirs(tokens).logits).abs().max()) < 1e-3


@pytest.mark.asset
@pytest.mark.peer
def test_smollm2_greedy_text_equals_transformers(smollm2: tuple[Transformer, Tokenizer], theirs: Any) -> None:
    model, tokenizer = smollm2
    engine = Engine(model, tokenizer, kv_cache_tokens=1024)
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    order = [engine.add(prompt, params) for prompt in PROMPTS]
    finished: dict[str, list[int]] = {}
    while engine.has_unfinished():
        finished |= {out.request_id: out.outputs[0].token_ids for out in engine.step() if out.finished}
    for prompt, request in zip(PROMPTS, order, strict=True):
        tokens = torch.tensor([tokenizer.encode(prompt)])
        expected = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, num_beams=1, max_new_tokens=64,
            min_new_tokens=64, eos_token_id=None, repetition_penalty=1.0,
        )  # fmt: skip
        assert finished[request] == expected[0, tokens.shape[1] :].tolist()


@pytest.mark.asset
def test_smollm2_tokenizer(smollm2: tuple[Transformer, Tokenizer]) -> None:
    _, tokenizer = smollm2
    assert tokenizer.vocab_size == 49_152
    assert [tokenizer.decode([token]) for token in tokenizer.encode("12345")] == list("12345")
    for sample in [LONG, *PROMPTS, "naïve café, 三十七, 😀\t\r\n  done", "x" * 500]:
        assert tokenizer.decode(tokenizer.encode(sample), skip_special_tokens=False) == sample
    assert tokenizer.token_of(tokenizer.eos_token_id) == "<|im_end|>"
    assert tokenizer.chat_template is not None


@pytest.mark.asset
def test_smollm2_cut_short_is_refused(tmp_path: Path) -> None:
    content = assets.get("smollm2-135m").read_bytes()
    path = tmp_path / "cut.gguf"
    for keep in (1 << 20, len(content) - 1):
        path.write_bytes(content[:keep])
        refused(path, "bytes")
