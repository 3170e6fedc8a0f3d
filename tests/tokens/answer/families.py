"""Chat templates with tools, as small as the families' own allow: what they print is what those print."""

from __future__ import annotations

import functools
import json
from typing import Any

from gristmill.core import Message, ToolCall
from gristmill.tokens.renderer import JinjaRenderer
from tokens.formats import LLAMA3_SPLIT, Format

_RESULTS = """
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
_TOOLS = "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}\n"

QWEN3 = (
    _TOOLS
    + """\
{%- set last = namespace(question=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > last.question and (loop.last or message.reasoning_content) %}
            {{- '<think>\\n' + (message.reasoning_content or '').strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- if not loop.first or message.content %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
"""
    + _RESULTS.lstrip("\n")
)

QWEN_CODER = (
    _TOOLS
    + """\
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content + '\\n' }}{%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
            {%- for key, value in call.function.arguments | items %}
                {{- '<parameter=' + key + '>\\n' }}
                {{- value | tojson if value is mapping or (value is sequence and value is not string) else value }}
                {{- '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
"""
    + _RESULTS.lstrip("\n")
)

LLAMA31 = """\
{{- bos_token }}
{%- if tools %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\nTools:\\n' + tools | tojson(indent=4) + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + ('ipython' if message.role == 'tool' else message.role) + '<|end_header_id|>\\n\\n' }}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '; ' if not loop.first }}
            {{- '{"name": "' + call.function.name + '", "parameters": ' + call.function.arguments | tojson + '}' }}
        {%- endfor %}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- (message.content | tojson if message.role == 'tool' else message.content) + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

_MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and loop.index0 == (messages | selectattr('role', 'equalto', 'user') | list | length) - 1 %}
            {{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
    {%- elif message.role == 'assistant' %}
        {{- message.content }}
        CALLS
        {{- eos_token }}
    {%- else %}
        {{- raise_exception('unknown role') }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL = _MISTRAL.replace(
    "CALLS",
    """{%- for call in message.tool_calls or [] %}
            {{- '[TOOL_CALLS][' if loop.first else ', ' }}
            {{- '{"id": "' + call.id + '", ' + (call.function | tojson)[1:] }}
            {{- ']' if loop.last }}
        {%- endfor %}""",
)
MISTRAL_ARGS = _MISTRAL.replace(
    "CALLS",
    """{%- for call in message.tool_calls or [] %}
            {{- '[TOOL_CALLS]' + call.function.name + '[CALL_ID]' + call.id + '[ARGS]' }}
            {{- call.function.arguments | tojson }}
        {%- endfor %}""",
)

_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>")
_SQUARE = ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")
_CALLS = ("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
FAMILIES = {
    "qwen3": Format("qwen3", QWEN3, _IM, "<|im_end|>", eos="<|im_end|>"),
    "qwen_coder": Format("qwen_coder", QWEN_CODER, _IM, "<|im_end|>", eos="<|im_end|>"),
    "llama3.1": Format(
        "llama3.1", LLAMA31, _HEADERS, "<|eot_id|>", bos="<|begin_of_text|>", eos="<|eot_id|>", split=LLAMA3_SPLIT
    ),
    "mistral": Format("mistral", MISTRAL, _SQUARE + _CALLS, "</s>", bos="<s>", eos="</s>"),
    "mistral_args": Format("mistral_args", MISTRAL_ARGS, _SQUARE + _CALLS, "</s>", bos="<s>", eos="</s>"),
}


@functools.cache
def renderer(name: str) -> JinjaRenderer:
    return JinjaRenderer(FAMILIES[name].tokenizer)


def tool(name: str, **properties: str) -> dict[str, Any]:
    """A tool as OpenAI writes it; `properties` are the types of its arguments."""
    schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": schema}}


TOOLS = [
    tool("find", place="string", count="integer", where="object", tags="array", deep="boolean"),
    tool("now"),
    tool("set_title", text="string"),
]
QUESTION: Message = {"role": "user", "content": "How many herons?"}


def call(index: int, name: str, arguments: dict[str, Any]) -> ToolCall:
    text = json.dumps(arguments, ensure_ascii=False)
    return {"id": f"abcDEF12{index}", "type": "function", "function": {"name": name, "arguments": text}}


def calling(*calls: ToolCall, content: str = "") -> Message:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}
