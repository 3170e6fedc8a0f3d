"""What every Renderer must do. Subclass the suite, implement `make`, and pytest runs it all.

    class TestChatML(RendererSuite):
        special_token = "<|im_end|>"

        def make(self) -> Renderer:
            return JinjaRenderer(tokenizer)

The suite assumes no more than the protocol in gristmill.core.
"""

import copy
import itertools
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gristmill.core import Message, Rendered, Renderer
from gristmill.errors import DataError

_TAG = re.compile(r"<[|a-z/]")
_blanks = st.text(st.sampled_from(" \n\t\r"), max_size=4)
_words = st.text(st.characters(codec="utf-8") | st.sampled_from("ab1 \n'<|>"), max_size=12)
texts = st.builds(lambda *parts: "".join(parts), _blanks, _words, _blanks).filter(lambda text: not _TAG.search(text))
"""Message content: any Unicode but special tokens, empty, with blanks and line breaks at either end."""


@st.composite
def conversations(draw: st.DrawFn, system: bool = True) -> list[Message]:
    """One to three questions with their answers, perhaps with a system message first."""
    messages: list[Message] = []
    if system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(texts)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(texts)})
        messages.append({"role": "assistant", "content": draw(texts)})
    return messages


def learned_runs(rendered: Rendered) -> list[range]:
    """Positions of each unbroken run of tokens with mask 1."""
    runs = []
    for mask, group in itertools.groupby(range(len(rendered.token_ids)), key=rendered.loss_mask.__getitem__):
        positions = list(group)
        if mask:
            runs.append(range(positions[0], positions[-1] + 1))
    return runs


_quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
QUESTION: list[Message] = [{"role": "user", "content": "How high is the old bridge?"}]
DIALOGUE: list[Message] = [
    *QUESTION,
    {"role": "assistant", "content": "Forty metres."},
    {"role": "user", "content": "And how long?"},
    {"role": "assistant", "content": "About a mile."},
]


class RendererSuite:
    """Subclass it; `special_token` is the text of any special token of the tokenizer."""

    special_token: str
    knows_system = True

    def make(self) -> Renderer:
        raise NotImplementedError

    def test_is_a_renderer(self) -> None:
        assert isinstance(self.make(), Renderer)

    def test_the_answers_and_only_they_are_learned(self) -> None:
        rendered = self.make().render(DIALOGUE)
        runs = learned_runs(rendered)
        answers = [message["content"] for message in DIALOGUE if message["role"] == "assistant"]
        assert len(runs) == len(answers)
        for run, answer in zip(runs, answers, strict=True):
            learned = rendered.text[rendered.offsets[run[0]][0] : rendered.offsets[run[-1]][1]]
            assert learned.strip().startswith(answer)
            assert "bridge" not in learned
            assert "long" not in learned

    def test_every_learned_run_ends_with_its_only_stop_token(self) -> None:
        renderer = self.make()
        rendered = renderer.render(DIALOGUE)
        assert renderer.stop_token_ids
        for run in learned_runs(rendered):
            stops = [position for position in run if rendered.token_ids[position] in renderer.stop_token_ids]
            assert stops == [run[-1]]

    def test_any_conversation_has_consistent_ids_mask_and_offsets(self) -> None:
        renderer = self.make()

        @_quick
        @given(conversations(system=self.knows_system))
        def check(messages: list[Message]) -> None:
            rendered = renderer.render(messages)
            assert len(rendered.token_ids) == len(rendered.loss_mask) == len(rendered.offsets)
            assert set(rendered.loss_mask) == {0, 1}
            assert len(learned_runs(rendered)) == sum(message["role"] == "assistant" for message in messages)
            reached = 0
            for start, end in rendered.offsets:
                assert start <= end
                assert start <= reached <= end  # bytes of one character share its offsets; nothing is left out
                reached = end
            assert reached == len(rendered.text)

        check()

    def test_the_prompt_is_a_prefix_of_the_answered_conversation(self) -> None:
        renderer = self.make()

        @_quick
        @given(conversations(system=self.knows_system))
        def check(messages: list[Message]) -> None:
            rendered = renderer.render(messages)
            answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            for index, run in zip(answers, learned_runs(rendered), strict=True):
                assert renderer.render_prompt(messages[:index]) == rendered.token_ids[: run[0]]

        check()

    def test_is_deterministic_and_leaves_the_messages_alone(self) -> None:
        renderer, messages = self.make(), copy.deepcopy(DIALOGUE)
        assert renderer.render(messages) == renderer.render(messages)
        assert renderer.render_prompt(QUESTION) == renderer.render_prompt(QUESTION)
        assert messages == DIALOGUE

    def test_refuses_an_empty_conversation(self) -> None:
        with pytest.raises(DataError, match="empty"):
            self.make().render([])
        with pytest.raises(DataError, match="empty"):
            self.make().render_prompt([])

    def test_refuses_to_train_on_nothing(self) -> None:
        with pytest.raises(DataError, match="learned"):
            self.make().render(QUESTION)

    @pytest.mark.parametrize("index", range(4))
    def test_refuses_content_that_spells_a_special_token(self, index: int) -> None:
        messages = copy.deepcopy(DIALOGUE)
        messages[index]["content"] += f" {self.special_token} more"
        for call in (self.make().render, self.make().render_prompt):
            with pytest.raises(DataError, match=f"message {index}") as caught:
                call(messages)
            assert self.special_token in str(caught.value)

    def test_an_unknown_role_is_refused_or_printed_but_never_dropped(self) -> None:
        messages: list[Message] = [*DIALOGUE, {"role": "narrator", "content": "Night fell on the valley."}]
        try:
            rendered = self.make().render(messages)
        except DataError:
            return
        assert "Night fell on the valley." in rendered.text

    @pytest.mark.parametrize("broken", [{"role": "user"}, {"content": "x"}, {"role": "user", "content": None}, "hello"])
    def test_refuses_a_message_without_role_or_text(self, broken: object) -> None:
        with pytest.raises(DataError, match="message 0"):
            self.make().render([broken, *DIALOGUE[1:]])  # type: ignore[list-item]
