"""PEFT's directories: the model with an adapter gives PEFT's logits, and what is not understood is refused by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gristmill.errors import CheckpointError
from gristmill.model.config import NormConfig, PositionConfig
from gristmill.model.formats.huggingface import save_huggingface
from gristmill.model.lora.low_rank import applied, merge
from gristmill.model.lora.peft import read_lora, save_lora
from model import tiny
from model.lora import adapters

IDS = tiny.ids(40)
PEFT: dict[str, dict[str, Any]] = {
    "some matrices": {"target_modules": ["q_proj", "v_proj"]},
    "every matrix": {"target_modules": "all-linear"},
    "by expression": {"target_modules": r".*\.[12]\.mlp\..*_proj|.*o_proj"},
    "without some": {"target_modules": list(adapters.NAMES), "exclude_modules": ["down_proj", "layers.1.mlp.up_proj"]},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "one layer": {"target_modules": ["k_proj"], "layers_to_transform": 1},
    "root of the rank": {"target_modules": ["gate_proj", "k_proj"], "use_rslora": True, "r": 7},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\.down_proj": 9},
        "alpha_pattern": {"k_proj": 5, "layers.2.self_attn.q_proj": 3},
    },
}


@pytest.fixture
def theirs(tmp_path: Path) -> Any:
    """transformers' model with the weights of `tiny.model()`."""
    transformers = pytest.importorskip("transformers")
    save_huggingface(tiny.model(), tmp_path / "base")
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()


def save_theirs(model: Any, directory: Path, **settings: Any) -> Any:
    """PEFT's model with random matrices, saved."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config).eval()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
        adapted.save_pretrained(directory)
    return adapted


@torch.no_grad()
def logits(directory: Path) -> torch.Tensor:
    model = tiny.model()
    with applied(model, [(slice(None), read_lora(directory, model.config))]):
        return model(IDS)


@pytest.mark.peer
@pytest.mark.parametrize("name", PEFT)
@torch.no_grad()
def test_logits_are_those_of_peft(theirs: Any, tmp_path: Path, name: str) -> None:
    before = theirs(IDS[None]).logits[0]
    expected = save_theirs(theirs, tmp_path / "adapter", **PEFT[name])(IDS[None]).logits[0]
    assert float((expected - before).abs().max()) > 1.0
    torch.testing.assert_close(logits(tmp_path / "adapter"), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.peer
@torch.no_grad()
def test_what_is_saved_here_is_read_by_peft_and_by_us(theirs: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = adapters.lora(4, ranks=(2, 5, 3), names=["q_proj", "gate_proj", "down_proj"])
    save_lora(lora, tmp_path / "adapter", base_model="tiny")
    model = tiny.model()
    merge(model, lora)
    expected = model(IDS)
    torch.testing.assert_close(logits(tmp_path / "adapter"), expected, rtol=1e-5, atol=1e-4)
    found = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()(IDS[None]).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_half_precision_files_are_read_as_they_are(tmp_path: Path) -> None:
    directory = adapters.write(tmp_path)
    path = directory / "adapter_model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    part = adapters.read(directory).parts["layers.1.mlp.down_proj"][0]
    assert torch.equal(part.up.bfloat16(), tensors[f"base_model.model.{part.name}.lora_B.weight"])
    assert part.up.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"shiny_new_way": 1}, "shiny_new_way"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.*q_proj"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": "("}, "regular expression"),
        ({"target_modules": "nothing"}, "names no matrix"),
        ({"target_modules": ["q_proj"]}, "no place.*k_proj"),
        ({"layers_to_transform": [0, 1]}, "no place.*layers.2"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform"),
        ({"r": 4}, "lora_A.*expected"),
        ({"r": "3"}, "r = '3'"),
        ({"rank_pattern": {"v_proj": 5}}, "v_proj.lora_A.*expected"),
        ({"rank_pattern": {"v_proj": 0}}, "rank of .*v_proj"),
        ({"alpha_pattern": {"v_proj": "much"}}, "alpha of .*v_proj"),
    ],
)
def test_keys_are_applied_or_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    directory = adapters.write(tmp_path)
    adapters.read(directory)
    adapters.write(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        adapters.read(directory)
    assert str(directory) in str(caught.value)


def test_the_tensors_must_be_those_that_the_configuration_names(tmp_path: Path) -> None:
    directory = adapters.write(tmp_path)
    path, name = directory / "adapter_model.safetensors", "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # the file is written over
    for changed, words in (
        ({k: v for k, v in tensors.items() if k != name}, "missing.*up_proj.lora_B"),
        ({**tensors, name.replace("up_proj", "router"): tensors[name].clone()}, "no place.*router"),
        ({**tensors, name: tensors[name][:-1].clone()}, "up_proj.lora_B"),
        ({**tensors, name: tensors[name].int()}, "up_proj.lora_B.*int32"),
        ({**tensors, name: tensors[name] * float("nan")}, "up_proj.lora_B.*finite"),
    ):
        save_file(changed, path)
        with pytest.raises(CheckpointError, match=words) as caught:
            adapters.read(directory)
        assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(CheckpointError, match="adapter_model"):
        adapters.read(directory)
    (directory / "adapter_model.bin").touch()
    with pytest.raises(CheckpointError, match="pickle"):
        adapters.read(directory)


def test_another_model_is_told_by_the_shapes(tmp_path: Path) -> None:
    directory = adapters.write(tmp_path)
    with pytest.raises(CheckpointError, match="has shape"):
        read_lora(directory, tiny.config(hidden_size=64))
    with pytest.raises(CheckpointError, match=r"no place.*layers\.2"):
        read_lora(directory, tiny.config(num_hidden_layers=2))
    unknown = tiny.config(norm=NormConfig(kind="layer", bias=True), positions=PositionConfig(absolute="learned"))
    with pytest.raises(CheckpointError):  # no family has it
        read_lora(directory, unknown)


def test_the_configuration_is_what_peft_wrote_or_less(tmp_path: Path) -> None:
    """Nothing but r and target_modules has to stand there; alpha is 8 then."""
    directory = adapters.write(tmp_path)
    (directory / "adapter_config.json").write_text(json.dumps({"r": 3, "target_modules": list(adapters.NAMES)}))
    assert adapters.read(directory).parts["layers.0.self_attn.o_proj"][0].scale == pytest.approx(8 / 3)
