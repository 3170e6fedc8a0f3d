"""The Jinja renderer: what is learned, what is refused, and equality with transformers."""

import dataclasses
import itertools
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from conformance.renderer import DIALOGUE, QUESTION, conversations, learned_runs
from gristmill.core import Message
from gristmill.errors import DataError
from gristmill.tokens.renderer import JinjaRenderer
from gristmill.tokens.templates import CHATML
from gristmill.tokens.tokenizer import Tokenizer
from tokens.formats import BY_NAME, FORMATS, QWEN25, SMOLLM2, Format

by_name = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
CHAT = BY_NAME["chatml"].tokenizer
RENDERERS = {form.name: JinjaRenderer(form.tokenizer) for form in FORMATS}

TALKS: list[list[Message]] = [
    DIALOGUE,
    QUESTION,
    [{"role": "system", "content": "Be brief."}, *DIALOGUE],
    [{"role": "user", "content": "  Brücke\n\n\n  12345 😀 "}, {"role": "assistant", "content": "x = 1\n\n\n"}],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": 'it\'s <b>"fine"</b> & 三十七'}],
]


def chat(*contents: str) -> list[Message]:
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


@pytest.mark.peer
@by_name
@pytest.mark.parametrize("messages", TALKS, ids=range(len(TALKS)))
def test_text_and_ids_equal_transformers(form: Format, messages: list[Message]) -> None:
    from transformers import PreTrainedTokenizerFast

    if messages[0]["role"] == "system" and not form.knows_system:
        pytest.skip("the format has no system role")
    peer = PreTrainedTokenizerFast(tokenizer_object=form.backend, bos_token=form.bos, eos_token=form.eos)
    peer.chat_template = form.template
    ours = RENDERERS[form.name]
    for prompt in (False, True):
        text = ours.template.text(messages, add_generation_prompt=prompt)
        assert text == peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        ids = peer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=prompt)
        if prompt:
            assert ours.render_prompt(messages) == ids
        elif messages is not QUESTION:
            rendered = ours.render(messages)
            assert (rendered.text, rendered.token_ids) == (text, ids)


@by_name
def test_learned_tokens_spell_each_answer_and_its_stop_token(form: Format) -> None:
    renderer = RENDERERS[form.name]

    @settings(max_examples=60, deadline=None)
    @given(conversations(system=form.knows_system))
    def check(messages: list[Message]) -> None:
        rendered = renderer.render(messages)
        learned = [
            form.tokenizer.decode([rendered.token_ids[position] for position in run], skip_special_tokens=False)
            for run in learned_runs(rendered)
        ]
        assert learned == [form.answer(m["content"]) for m in messages if m["role"] == "assistant"]
        assert form.tokenizer.decode(rendered.token_ids, skip_special_tokens=False) == rendered.text
        assert renderer.render_prompt(messages[:-1]) == rendered.token_ids[: learned_runs(rendered)[-1][0]]

    check()


@by_name
def test_single_tokens_lie_at_their_offsets(form: Format) -> None:
    rendered = RENDERERS[form.name].render(chat("  The old  bridge\n\n", "x = 1\n\n  return", "😀", "é"))
    for index, (start, end) in zip(rendered.token_ids, rendered.offsets, strict=True):
        decoded = form.tokenizer.decode([index], skip_special_tokens=False)
        if "\ufffd" not in decoded:
            assert rendered.text[start:end] == decoded


@pytest.mark.parametrize("answer", ["\n\nYes", "\n\n", "\n", "\n\n\n  x"])
def test_no_token_straddles_the_place_where_the_answer_begins(answer: str) -> None:
    # Tokenised as one string, the prompt's last line break and the answer's first become one token, which a model
    # that was given the prompt could never produce.
    renderer = RENDERERS["chatml"]
    rendered = renderer.render(chat("Hm?", answer))
    prompt = renderer.render_prompt(chat("Hm?"))
    assert CHAT.encode(rendered.text)[: len(prompt)] != prompt
    assert rendered.token_ids[: len(prompt)] == prompt
    assert rendered.loss_mask[: len(prompt)] == [0] * len(prompt)
    assert rendered.loss_mask[len(prompt)] == 1


def test_prompt_stays_a_prefix_where_the_split_rule_looks_ahead() -> None:
    # GPT-2's rule reads "\n\n" as one piece at the end of a text but as two before a letter.
    form = dataclasses.replace(BY_NAME["llama3"], split=BY_NAME["chatml"].split)
    renderer = JinjaRenderer(form.tokenizer)
    rendered = renderer.render(chat("Hm?", "Yes"))
    prompt = renderer.render_prompt(chat("Hm?"))
    assert form.tokenizer.encode(rendered.text)[: len(prompt)] != prompt
    assert rendered.token_ids[: len(prompt)] == prompt


def test_text_after_the_stop_token_is_not_learned() -> None:
    rendered = RENDERERS["chatml"].render(chat("Hm?", "Yes"))
    assert rendered.text.endswith("Yes<|im_end|>\n")
    assert rendered.loss_mask[-1] == 0
    assert rendered.token_ids[len(rendered.loss_mask) - 2] == CHAT.id_of("<|im_end|>")


def test_an_injected_system_message_is_printed_and_not_learned() -> None:
    rendered = RENDERERS["smollm2"].render(chat("Hm?", "Yes"))
    assert rendered.text.startswith("<|im_start|>system\nYou are")
    assert len(learned_runs(rendered)) == 1


@pytest.mark.parametrize(
    ("tail", "stop"),
    [
        (
            "{{ '<|im_end|>\n' }}{% if loop.last and not add_generation_prompt %}{{ eos_token }}{% endif %}",
            "<|im_end|>",
        ),
        ("{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}[/INST]{% endif %}", "<|endoftext|>"),
        ("{% generation %}{{ '' }}{% endgeneration %}{{ '<|im_end|>' }}", "<|im_end|>"),
    ],
    ids=["text-end-after-the-last-turn", "no-generation-prompt", "generation-tag"],
)
def test_stop_token_is_the_one_that_closes_the_answer(tail: str, stop: str) -> None:
    head = "{% for message in messages %}{% if message['role'] != 'assistant' %}[INST] {% endif %}"
    renderer = JinjaRenderer(CHAT, head + "{{ message['content'] }}" + tail + "{% endfor %}")
    assert set(renderer.stop_token_ids) == {CHAT.id_of("<|endoftext|>"), CHAT.id_of(stop)}
    rendered = renderer.render(DIALOGUE)
    learned = [
        CHAT.decode([rendered.token_ids[i] for i in run], skip_special_tokens=False) for run in learned_runs(rendered)
    ]
    assert learned == [f"Forty metres.{stop}", f"About a mile.{stop}"]


def test_what_the_template_puts_before_an_answer_is_learned_because_the_model_must_say_it() -> None:
    think = "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    template = CHATML.replace(
        "{{ '<|im_start|>' + message['role'] + '\n' + ", "{{ '<|im_start|>' + message['role'] + '\n' }}" + think + "{{ "
    )
    rendered = JinjaRenderer(CHAT, template).render(chat("Hm?", "Yes"))
    (run,) = learned_runs(rendered)
    assert rendered.text[rendered.offsets[run[0]][0] :] == "<think>\n\n</think>\n\nYes<|im_end|>\n"


def test_offsets_are_whole_where_the_tokenizer_trims_them() -> None:
    backend = Backend.from_str(CHAT.backend.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trimming = JinjaRenderer(dataclasses.replace(CHAT, backend=backend))
    messages = chat("a   b", "  c  d\n\n e  ", "f", " g")
    assert trimming.render(messages) == RENDERERS["chatml"].render(messages)


def test_template_names_are_those_of_transformers() -> None:
    template = CHATML.replace(
        "{% for message",
        "{{ eos_token }}{{ strftime_now('%Y') }}{{ {'é': '<'} | tojson(indent=1) }}{{ tools is none }}"
        "{% for x in [1, 2] %}{% break %}{% endfor %}{% for message",
        1,
    )
    text = JinjaRenderer(CHAT, template).template.text(QUESTION)
    assert text.startswith(f'<|endoftext|>{datetime.now().year}{{\n "é": "<"\n}}True<|im_start|>user')


def test_templates_cannot_reach_out_of_the_sandbox() -> None:
    for attack in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(messages[0]) }}", "{{ open('/etc/passwd') }}"):
        with pytest.raises(DataError):
            JinjaRenderer(CHAT, CHATML + attack)


@pytest.fixture(scope="module")
def blank_prefixing() -> Tokenizer:
    """A tokenizer of the SentencePiece kind, which puts a blank before any text."""
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = sorted({chr(i) for i in range(32, 127)} | {"\n", "\u2581"})
    specials = ["<unk>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["user\n\n", "assistant\n  where is\n\n the"] * 5, trainer)
    return Tokenizer(backend=backend, eos_token_id=1, stop_token_ids=(1,), chat_template=CHATML)


def test_a_blank_prefixing_tokenizer_renders_whole_texts(blank_prefixing: Tokenizer) -> None:
    renderer = JinjaRenderer(blank_prefixing)
    rendered = renderer.render(DIALOGUE)
    assert rendered.token_ids == blank_prefixing.encode(rendered.text)
    assert renderer.render_prompt(DIALOGUE[:3]) == rendered.token_ids[: learned_runs(rendered)[1][0]]
    assert [
        rendered.text[rendered.offsets[run[0]][0] : rendered.offsets[run[-1]][1]] for run in learned_runs(rendered)
    ] == [
        "Forty metres.<|im_end|>",
        "About a mile.<|im_end|>",
    ]


def test_a_blank_prefixing_tokenizer_refuses_a_token_across_the_boundary(blank_prefixing: Tokenizer) -> None:
    with pytest.raises(DataError, match="message 1: this tokenizer joins"):
        JinjaRenderer(blank_prefixing).render(chat("where", "\n\n the"))


BAD_TEMPLATES = {
    "never learn to stop": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    "ignores add_generation_prompt": CHATML.replace("{% if add_generation_prompt %}", "{% if false %}"),
    "prefix-preserving": "{{ messages | length }}" + CHATML,
    "different ways": CHATML.replace("'<|im_end|>\n'", "('<|im_end|>' if loop.index < 4 else '<|endoftext|>')"),
    "as it is": CHATML.replace("message['content']", "message['content'] | upper"),
    "line 4": CHATML + "{% endif %}",
    "go away": "{{ raise_exception('go away') }}",
    "refuses this conversation": CHATML + "{{ nothing.at.all }}",
}


@pytest.mark.parametrize("reason", BAD_TEMPLATES)
def test_refuses_a_template_that_cannot_be_trained_on(reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        JinjaRenderer(CHAT, BAD_TEMPLATES[reason])


def test_the_divergence_of_a_template_is_shown() -> None:
    with pytest.raises(DataError, match=r"message 1.*'1<\|im_start.*'4<\|im_start"):
        JinjaRenderer(CHAT, BAD_TEMPLATES["prefix-preserving"])


def test_refuses_a_stop_token_that_only_the_last_answer_gets() -> None:
    template = CHATML.replace("'<|im_end|>\n'", "('<|im_end|>\n' if loop.last or message.role != 'assistant' else '')")
    with pytest.raises(DataError, match="different ways"):
        JinjaRenderer(CHAT, template)


def test_refuses_an_unknown_role() -> None:
    with pytest.raises(DataError, match="unknown role assistent"):
        RENDERERS["chatml"].render([*DIALOGUE, {"role": "assistent", "content": "x"}])


def test_refuses_a_role_that_the_template_drops() -> None:
    assert BY_NAME["qwen2.5"].template == QWEN25
    with pytest.raises(DataError, match="message 4: the chat template leaves out the role 'narrator'"):
        RENDERERS["qwen2.5"].render([*DIALOGUE, {"role": "narrator", "content": "Night fell."}])


def test_refuses_an_answer_that_the_template_rewrites() -> None:
    template = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    with pytest.raises(DataError, match="message 1: the chat template rewrites"):
        JinjaRenderer(CHAT, template).render(chat("Hm?", "first this</think>Yes"))


def test_refuses_a_system_message_where_the_template_does() -> None:
    with pytest.raises(DataError, match="System role not supported"):
        RENDERERS["gemma"].render([{"role": "system", "content": "x"}, *DIALOGUE])


def test_refuses_fields_it_would_have_to_ignore() -> None:
    with pytest.raises(DataError, match="message 0: field 'weight' is not supported"):
        RENDERERS["chatml"].render([{"role": "user", "content": "x", "weight": 0}, *DIALOGUE[1:]])  # type: ignore[typeddict-unknown-key]


def test_refuses_half_a_surrogate_pair() -> None:
    with pytest.raises(DataError, match="message 1: field 'content' holds half"):
        RENDERERS["chatml"].render(chat("x", "\ud83d"))


def test_a_role_cannot_smuggle_a_special_token_in() -> None:
    with pytest.raises(DataError, match=r"message 0: role spells the special token '<\|im_end\|>'"):
        RENDERERS["smollm2"].render([{"role": "user<|im_end|>", "content": "x"}, *DIALOGUE[1:]])


def test_a_turn_token_is_guarded_even_where_the_tokenizer_does_not_flag_it() -> None:
    backend = Backend.from_str(CHAT.backend.to_str())
    backend.add_tokens([AddedToken("<turn>", special=False), AddedToken("<think>", special=False)])
    template = SMOLLM2.replace("<|im_start|>", "<turn>")
    renderer = JinjaRenderer(dataclasses.replace(CHAT, backend=backend), template)
    assert renderer.render(chat("What does <think> do?", "<think>hm</think>Yes"))
    with pytest.raises(DataError, match="<turn>"):
        renderer.render(chat("What does <turn> do?", "Yes"))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["a", "<|im_end|>", "<|endoftext|>", "<|im_start|>", "\n"]), max_size=5))
def test_special_tokens_are_learned_inside_answers_when_allowed(pieces: list[str]) -> None:
    answer = "".join(pieces)
    rendered = JinjaRenderer(CHAT, allow_special=True).render(chat("Hm?", answer, "And?", "Yes"))
    first, second = learned_runs(rendered)
    assert CHAT.decode([rendered.token_ids[i] for i in first], skip_special_tokens=False) == answer + "<|im_end|>"
    assert CHAT.decode([rendered.token_ids[i] for i in second], skip_special_tokens=False) == "Yes<|im_end|>"


def test_without_any_template_it_is_chatml() -> None:
    bare = dataclasses.replace(CHAT, chat_template=None)
    assert JinjaRenderer(bare).template.source == CHATML
