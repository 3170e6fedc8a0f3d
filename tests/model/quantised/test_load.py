"""Quantised models from floats, from GGUF files and from our own checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor, nn

from engine import helpers
from gristmill.errors import CheckpointError, RequestError
from gristmill.files import write_json
from gristmill.model.formats.gguf.writer import save_gguf
from gristmill.model.formats.safetensors_file import SafetensorsFile, save_tensors
from gristmill.model.int8 import Int8Linear
from gristmill.model.load import load_any, load_model
from gristmill.model.quantised.checkpoint import save_quantised
from gristmill.model.quantised.linear import Int4Linear, Int8WeightLinear, weight_of
from gristmill.model.quantised.load import load_quantised
from gristmill.model.quantised.quantise import model_bytes, quantise_model
from gristmill.model.quantised.weights import Scheme, unpack
from gristmill.model.transformer import Transformer
from model import gguf_files, tiny
from model.peak import peak_bytes
from model.quantised import tiny4

SCHEMES: list[Scheme] = ["int8", "w8a8", "int4"]
LINEARS = (Int4Linear, Int8Linear, Int8WeightLinear)


def same(left: nn.Module, right: nn.Module) -> bool:
    """The same layers with the same bits."""
    first, second = left.state_dict(), right.state_dict()
    kinds = [[type(layer) for layer in model.modules()] for model in (left, right)]
    return (
        kinds[0] == kinds[1]
        and first.keys() == second.keys()
        and all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "options", [{}, {"head": False}, {"embedding": True}, {"head": False, "embedding": True}], ids=str
)
@pytest.mark.parametrize("tied", [True, False])
def test_loading_is_quantising_what_was_loaded(
    tmp_path: Path, scheme: Scheme, options: dict[str, bool], tied: bool
) -> None:
    helpers.save(tmp_path / "float", tiny4.model(tie_word_embeddings=tied))
    if tied and options == {"head": False, "embedding": True}:
        for quantise in (
            lambda: load_quantised(tmp_path / "float", scheme, **options),
            lambda: quantise_model(tiny4.model(), scheme, **options),
        ):
            with pytest.raises(RequestError, match="the head is tied to it"):
                quantise()
        return
    found, tokenizer = load_quantised(tmp_path / "float", scheme, **options)
    expected, _ = load_model(tmp_path / "float")
    report = quantise_model(expected, scheme, **options)
    assert same(found, expected)
    assert model_bytes(found) == report.bytes_after
    assert not found.training
    assert tokenizer.vocab_size == 300
    save_quantised(expected, tokenizer, tmp_path / "quantised", report)
    keep = options.get("embedding", False)
    again, _ = load_quantised(tmp_path / "quantised", scheme, embedding=keep)
    assert same(again, expected)
    assert model_bytes(again) == report.bytes_after  # what was shared is shared again
    size = (tmp_path / "quantised/model.safetensors").stat().st_size
    assert report.bytes_after <= size < report.bytes_after + 9000  # the header names tensors


def test_every_reader_takes_a_quantised_directory_as_it_is(tmp_path: Path) -> None:
    helpers.save(tmp_path / "float", tiny4.model())
    model, tokenizer = load_model(tmp_path / "float")
    save_quantised(model, tokenizer, tmp_path / "int4", quantise_model(model, "int4", embedding=True))
    found, again = load_model(tmp_path / "int4")
    assert isinstance(found.layers[0].mlp.down_proj, Int4Linear)
    assert isinstance(found.embed_tokens, nn.Embedding)  # expanded, for whoever reads its weight
    ids = torch.tensor(tiny4.text()[0])
    assert torch.equal(found(ids), model(ids))
    assert again.encode("the river") == tokenizer.encode("the river")
    assert load_any(tmp_path / "int4", dtype="bfloat16")[0](ids).dtype == torch.bfloat16


@pytest.mark.peer
def test_transformers_refuses_it_too(tmp_path: Path) -> None:
    import transformers

    helpers.save(tmp_path / "float", tiny4.model())
    model, tokenizer = load_model(tmp_path / "float")
    save_quantised(model, tokenizer, tmp_path / "int8", quantise_model(model, "int8"))
    with pytest.raises(ValueError, match="gristmill_quantised"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "int8")


def test_int8_and_w8a8_stand_for_each_other_and_int4_does_not(tmp_path: Path) -> None:
    helpers.save(tmp_path / "float", tiny4.model())
    model, tokenizer = load_model(tmp_path / "float")
    save_quantised(model, tokenizer, tmp_path / "int8", quantise_model(model, "int8"))
    other, _ = load_quantised(tmp_path / "int8", "w8a8")
    assert isinstance(other.layers[0].mlp.down_proj, Int8Linear)
    with pytest.raises(CheckpointError, match="holds int8, not int4"):
        load_quantised(tmp_path / "int8", "int4")
    with pytest.raises(RequestError, match="its weights are floating; name a scheme"):
        load_quantised(tmp_path / "float")


def gguf_file(path: Path, kind: Any, changed: dict[str, Tensor] | None = None) -> Path:
    values = gguf_files.CONFIG | {"architectures": ["LlamaForCausalLM"]}
    save_gguf(values, gguf_files.weights() | (changed or {}), gguf_files.tokenizer(), path, file_type=kind)
    return path


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gguf_tensors_are_rounded_from_their_values(tmp_path: Path, kind: str, scheme: Scheme) -> None:
    path = gguf_file(tmp_path / "x.gguf", kind)
    found, _ = load_quantised(path, scheme, group_size=32)
    expected, _ = load_model(path)
    ids = tiny.ids(50)
    if scheme == "int4" and kind == "q4_0":
        assert (found(ids) - expected(ids)).abs().max() < 0.02 * expected(ids).std()  # but for the head, exact
        return
    quantise_model(expected, scheme, group_size=32)
    assert same(found, expected)


def test_q4_0_blocks_are_kept_bit_for_bit(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "x.gguf", "q4_0")
    found, _ = load_quantised(path, "int4")
    exact, _ = load_model(path)
    for name, layer in found.named_modules():
        if isinstance(layer, Int4Linear):
            weight = weight_of(layer)
            assert layer.scale.dtype == torch.float32
            assert torch.equal(weight.dequantised(), exact.get_submodule(name).weight), name
    # against the library's own blocks, for a matrix whose rows keep their places
    reader = gguf.GGUFReader(path)
    raw = next(tensor.data for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight")
    blocks = raw.reshape(-1, 18)
    down = found.layers[0].mlp.down_proj
    assert (down.scale.numpy().reshape(-1) == blocks[:, :2].copy().view("float16").reshape(-1)).all()
    codes = unpack(down.packed).numpy().reshape(-1, 2, 16) + 8
    assert (codes[:, 0] == blocks[:, 2:] & 15).all()
    assert (codes[:, 1] == blocks[:, 2:] >> 4).all()
    other, _ = load_quantised(path, "int4", group_size=64)  # blocks of 32 are rounded anew
    assert weight_of(other.layers[0].mlp.down_proj).shape == (64, 96)
    assert isinstance(other.layers[0].mlp.down_proj, Int8WeightLinear)


@pytest.mark.parametrize("source", ["directory", "gguf"])
def test_never_more_than_one_stored_tensor_is_floating(tmp_path: Path, source: str) -> None:
    model = tiny4.model(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, tie_word_embeddings=False)
    path = helpers.save(tmp_path / "float", model)
    if source == "gguf":
        from gristmill.model.convert import export_gguf

        export_gguf(path, tmp_path / "x.gguf", file_type="q8_0")
        path = tmp_path / "x.gguf"
    largest = 1024 * 256 * 4
    whole = model_bytes(model)
    loaded: list[Transformer] = []
    peak = peak_bytes(lambda: loaded.append(load_quantised(path, "int8")[0]))
    kept = model_bytes(loaded[0])
    assert kept < 0.35 * whole
    # a tensor as it is read, once more as its rows find their places, and what rounding one slab takes
    assert peak < kept + 4 * largest < 0.7 * whole
    # where a Hugging Face tensor is one of three in ours, only the third is floating
    assert peak_bytes(lambda: load_model(path)) > whole


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    broken = tiny4.model()
    with torch.no_grad():
        broken.layers[1].mlp.down_proj.weight[3, 3] = float("inf")
    helpers.save(tmp_path / "float", broken)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: a weight is not a finite"):
        load_quantised(tmp_path / "float", "int4")


def _edit(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    values = json.loads(path.read_text())
    values["quantisation"] |= changes
    write_json(path, values)


def _retensor(directory: Path, change: Any) -> None:
    file = SafetensorsFile(directory / "model.safetensors")
    tensors = {name: file.read(name) for name in file}
    change(tensors)
    save_tensors(tensors, directory / "model.safetensors")


DOWN = "layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: _edit(d, version=2), "version 2 of quantised models is not known"),
        (lambda d: _edit(d, zero_point=True), "quantisation.zero_point is not known"),
        (lambda d: _edit(d, scheme="int3"), "scheme 'int3' with group_size 32 is not supported"),
        (lambda d: _edit(d, group_size=7), "group_size 7 is not supported"),
        (lambda d: _edit(d, group_size=64), r"\.scale is .*, expected"),
        (lambda d: write_json(d / "config.json", {"model_type": "gristmill_quantised"}), "expected model_type, quant"),
        (lambda d: _retensor(d, lambda t: t.pop(f"{DOWN}.packed")), rf"missing: {DOWN}\.weight"),
        (lambda d: _retensor(d, lambda t: t.pop(f"{DOWN}.scale")), rf"tensor {DOWN}\.scale is missing"),
        (lambda d: _retensor(d, lambda t: t.pop("norm.weight")), r"missing: norm\.weight"),
        (lambda d: _retensor(d, lambda t: t.update(x=torch.ones(2))), "no place in this configuration: x"),
        (lambda d: _retensor(d, lambda t: t.update(x=torch.ones(2).int())), r"tensor x of type torch\.int32"),
        (lambda d: _retensor(d, lambda t: t[f"{DOWN}.scale"].fill_(float("nan"))), "no list of finite scales"),
        (
            lambda d: _retensor(d, lambda t: t.update({f"{DOWN}.packed": torch.zeros(64, 48, dtype=torch.int8)})),
            r"torch\.int8 \(64, 48\), expected torch\.uint8 \(64, 48\)",
        ),
        (lambda d: _retensor(d, lambda t: t.update({"norm.weight": torch.ones(3)})), r"norm\.weight has shape \(3,\)"),
    ],
)
def test_a_damaged_or_unknown_checkpoint_is_refused_by_name(tmp_path: Path, damage: Any, words: str) -> None:
    model = tiny4.model()
    save_quantised(model, helpers.tokenizer(), tmp_path / "x", quantise_model(model, "int4"))
    damage(tmp_path / "x")
    with pytest.raises(CheckpointError, match=words):
        load_any(tmp_path / "x")


def test_nothing_stays_of_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny4.model()
    report = quantise_model(model, "int4")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gristmill.model.formats.safetensors_file.save_file", full)
    with pytest.raises(Exception, match="No space left"):
        save_quantised(model, helpers.tokenizer(), tmp_path / "x", report)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.asset
def test_a_real_gguf_file_in_each_scheme() -> None:
    exact, tokenizer = load_model("smollm2-135m")
    ids = torch.tensor(tokenizer.encode("The Moon is the only natural satellite of the Earth. It orbits at a distance"))
    with torch.inference_mode():
        before = exact(ids)
    for scheme in SCHEMES:
        found, _ = load_quantised("smollm2-135m", scheme, embedding=True)
        with torch.inference_mode():
            after = found(ids)
        nats = [float(torch.nn.functional.cross_entropy(x[:-1], ids[1:])) for x in (before, after)]
        share = model_bytes(found) / model_bytes(exact)
        print(f"{scheme}: {share:.3f} of the bytes, {nats[0]:.3f} -> {nats[1]:.3f} nats per token")
        assert share < {"int4": 0.175}.get(scheme, 0.255)
        assert nats[1] < nats[0] + {"int4": 0.6}.get(scheme, 0.2)
