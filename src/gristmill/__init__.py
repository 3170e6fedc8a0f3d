"""Gristmill: a language model's whole life in one package. See README.md for the two commands to start with.

The public names load on first use, so that `import gristmill` is quick and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gristmill.core import CompletionOutput, Message, RequestOutput, SamplingParams, Score
from gristmill.errors import GristmillError

if TYPE_CHECKING:
    from gristmill.engine.llm import LLM
    from gristmill.model.load import load_model

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CompletionOutput",
    "GristmillError",
    "Message",
    "RequestOutput",
    "SamplingParams",
    "Score",
    "load_model",
]

_LAZY = {"LLM": "gristmill.engine.llm", "load_model": "gristmill.model.load"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gristmill' has no attribute {name!r}")
