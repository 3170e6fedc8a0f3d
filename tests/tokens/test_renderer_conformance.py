"""The renderer suite on ChatML, Llama-3 and Gemma."""

from conformance.renderer import RendererSuite
from gristmill.core import Renderer
from gristmill.tokens.renderer import JinjaRenderer
from tokens.formats import BY_NAME


class TestChatML(RendererSuite):
    special_token = "<|im_end|>"

    def make(self) -> Renderer:
        return JinjaRenderer(BY_NAME["chatml"].tokenizer)


class TestLlama3(RendererSuite):
    special_token = "<|start_header_id|>"

    def make(self) -> Renderer:
        return JinjaRenderer(BY_NAME["llama3"].tokenizer)


class TestGemma(RendererSuite):
    special_token = "<end_of_turn>"
    knows_system = False

    def make(self) -> Renderer:
        return JinjaRenderer(BY_NAME["gemma"].tokenizer)
