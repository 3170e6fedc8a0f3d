"""The common chat formats, each with a small byte-level tokenizer that knows its special tokens."""

import functools
from dataclasses import dataclass

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from gristmill.tokens.templates import CHATML
from gristmill.tokens.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. You are a helpful assistant, user and system.",
    "def f(x):\n    return x + 1\n\n\nclass A:\n\n    pass\n",
    "Wie hoch ist die alte Brücke? Quarante mètres, à peu près. 三十七 😀 12345",
] * 3

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

QWEN25 = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role in ('user', 'assistant') or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

SMOLLM2 = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful small model<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def backend(specials: tuple[str, ...], split: str = GPT2_SPLIT) -> Backend:
    """A byte-level BPE tokenizer of 400 ids. Shared: do not change it."""
    built = Backend(models.BPE())
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator(CORPUS, trainer)
    return built


@dataclass(frozen=True)
class Format:
    """A chat format: its template, special tokens and habits."""

    name: str
    template: str
    specials: tuple[str, ...]
    closing: str
    eos: str
    bos: str | None = None
    split: str = GPT2_SPLIT
    knows_system: bool = True
    trims: bool = False

    @property
    def backend(self) -> Backend:
        return backend(self.specials, self.split)

    @property
    def tokenizer(self) -> Tokenizer:
        eos = self.backend.token_to_id(self.eos)
        return Tokenizer(
            backend=self.backend,
            bos_token_id=None if self.bos is None else self.backend.token_to_id(self.bos),
            eos_token_id=eos,
            stop_token_ids=(eos,),
            chat_template=self.template,
        )

    def answer(self, content: str) -> str:
        """What the template prints for an answer, its stop token included."""
        return (content.strip() if self.trims else content) + self.closing


_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FORMATS = [
    Format("chatml", CHATML, _IM, "<|im_end|>", eos="<|endoftext|>"),
    Format(
        "llama3",
        LLAMA3,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        split=LLAMA3_SPLIT,
        trims=True,
    ),
    Format("qwen2.5", QWEN25, _IM, "<|im_end|>", eos="<|im_end|>", split=LLAMA3_SPLIT),
    Format(
        "gemma",
        GEMMA,
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        bos="<bos>",
        eos="<eos>",
        knows_system=False,
        trims=True,
    ),
    Format("smollm2", SMOLLM2, _IM, "<|im_end|>", bos="<|im_start|>", eos="<|im_end|>"),
]
BY_NAME = {form.name: form for form in FORMATS}
