"""The models of bench/engine.py in every form that a side reads, all written from one checkpoint of floats.

They lie in ~/.cache/gristmill/bench (or --directory) and are made when they are first asked for.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

MODELS = ("smollm2-135m", "llama-1.1b")
DIRECTORY = Path.home() / ".cache" / "gristmill" / "bench"
ELSEWHERE = {"llama": "LLAMA", "vllm": "VLLM", "openvino": "OPENVINO", "ctranslate2": "CTRANSLATE2"}
LLAMA = {
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "vocab_size": 32_000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def interpreter(library: str) -> str | None:
    """The Python that has a library; None where GRISTMILL_<LIBRARY>_PYTHON does not name it."""
    return os.environ.get(f"GRISTMILL_{ELSEWHERE[library]}_PYTHON") if library in ELSEWHERE else sys.executable


def weights(model: str, side: str, directory: Path = DIRECTORY) -> Path:
    """Where a side such as "llama:q8_0" finds a model; made if it is not there. A path is taken as it is."""
    library, kind = side.split(":")
    if model not in MODELS:
        return Path(model)
    folder = directory / model
    base = folder / "hf"
    if not base.exists():
        _made(base, lambda part: _make_base(model, part))
    if library == "llama" or side == "gristmill:int4":  # the same four bits as llama.cpp's
        kind = "q4_0" if kind == "int4" else kind
        target = folder / f"{kind}.gguf"
        options = ["--format", "gguf", "--file_type", kind]
        return _made(target, lambda part: _call(sys.executable, "-m", "gristmill", "export", base, part, *options))
    if library == "openvino":
        name, tool = f"openvino-{kind}", _python(library).with_name("optimum-cli")
        form = ["--weight-format", kind] + (["--group-size", "32", "--ratio", "1.0", "--sym"] if kind == "int4" else [])
        command = [tool, "export", "openvino", "-m", base, "--task", "text-generation-with-past", *form]
        return _made(folder / name, lambda part: _call(*command, part))
    if library == "ctranslate2":
        tool = _python(library).with_name("ct2-transformers-converter")
        command = [tool, "--model", base, "--quantization", kind, "--output_dir"]
        return _made(folder / f"ctranslate2-{kind}", lambda part: _call(*command, part))
    return base


def _made(target: Path, make: object) -> Path:
    """The path, made beside it first, so that a broken attempt leaves nothing that looks whole."""
    if not target.exists():
        part = target.with_name(f"part-{target.name}")
        shutil.rmtree(part, ignore_errors=True)
        part.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"making {target}", file=sys.stderr)
        make(part)  # type: ignore[operator]
        part.rename(target)
    return target


def _make_base(model: str, folder: Path) -> None:
    if model == "smollm2-135m":
        _call(sys.executable, "-m", "gristmill", "export", "smollm2-135m", folder, "--dtype", "float32")
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # so that every float form holds the same weights
    LlamaForCausalLM(LlamaConfig(**LLAMA, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    _cut_tokenizer(weights("smollm2-135m", "gristmill:float32", folder.parent.parent), folder, LLAMA["vocab_size"])


def _cut_tokenizer(source: Path, target: Path, size: int) -> None:
    """The first `size` tokens of a byte-level BPE tokenizer, and the merges that make them."""
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    parts = tokenizer["model"]
    parts["vocab"] = {token: number for token, number in parts["vocab"].items() if number < size}
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in parts["merges"]]
    parts["merges"] = [pair for pair in pairs if "".join(pair) in parts["vocab"]]
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(source / "tokenizer_config.json", target)


def _python(library: str) -> Path:
    found = interpreter(library)
    assert found is not None, library
    return Path(found)


def _call(*command: object) -> None:
    words = [str(word) for word in command]
    path = f"{Path(words[0]).parent}:{os.environ.get('PATH', '')}"
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PATH": path})
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}:\n{done.stderr[-3000:]}")
