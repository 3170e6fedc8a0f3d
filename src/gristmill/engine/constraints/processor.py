"""Structured output: only tokens that lead to a text of the asked form, and to its end within the budget.

The library holds the grammar and tells which tokens it allows. A token that may make the output too long to end in time
is allowed only when an end within `max_tokens` is known after it; of those tokens the most probable ones are tried.

Source: Willard and Louf 2023 (masks from automata); Geng et al. 2023 (grammars); llguidance for both.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gristmill.core import BatchUpdate, LogitsRow, SamplingParams, StructuredOutput
from gristmill.engine.constraints.closing import byte_tokenizer, next_plan, shortest_end
from gristmill.engine.constraints.form import Form, form_of
from gristmill.errors import MissingExtra, RequestError
from gristmill.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Mask = NDArray[np.bool_]

_KEPT_FORMS = 64
_TRIED, _NEGLIGIBLE = 64, 12.0
"""Most tokens of one row that are tried for an end within the budget, and by how many nats they may be less probable
than the best: the others are forbidden untried."""
_WALKS, _STEPS = 8, 1_000
"""Searches for an end after a token was chosen, and their length; a trial has one of `_TRIAL_STEPS`."""
_TRIAL_STEPS = 8
_STRUCTURAL = (b"{", b"}", b"[", b"]", b'"', b":", b",")
_LONGEST = 8
"""Longest token, in bytes, that an end is spelled with."""


class Constraints:
    """Keeps outputs to the form that `SamplingParams.structured` asks for, and ends them before `max_tokens`.

    vocab_size: of the logits. max_model_len: bounds an output whose `max_tokens` is None. Outputs end with an end
    token, so their finish reason is "stop". A row whose output is not one of the form (a rejected draft) is left alone.
    """

    is_argmax_invariant = False

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, max_model_len: int) -> None:
        self.tokenizer, self.vocab_size, self.max_model_len = tokenizer, vocab_size, max_model_len
        self._forms: OrderedDict[str, Compiled] = OrderedDict()
        self._outputs: dict[int, _Output] = {}
        self._vocabularies: dict[tuple[str, ...], _Vocabulary] = {}

    def validate(self, params: SamplingParams) -> None:
        """Raises RequestError for a form that cannot be compiled or satisfied, one whose shortest output does not fit
        `max_tokens`, and for parameters that do not go with a form; MissingExtra without llguidance."""
        if params.structured is None:
            return
        if not self._end_ids(params):
            raise RequestError(
                "structured: no end token is left to end the output with. Leave ignore_eos out, or give stop_token_ids",
                field="ignore_eos" if params.ignore_eos else "stop_token_ids",
            )
        if params.min_tokens > 0:
            raise RequestError("min_tokens does not go with structured: the form tells the length", field="min_tokens")
        if params.limits_thinking and (params.structured.outside or "x")[0] != "":
            raise RequestError(
                "structured begins with the first token: no thinking before it, unless structured.outside has an empty "
                "opening",
                field="structured",
            )
        shortest = self.shortest_output(params)
        if params.max_tokens is not None and shortest > params.max_tokens:
            raise RequestError(
                f"the shortest output of structured.{params.structured.kind} that was found takes {shortest} tokens, "
                f"its end included; max_tokens is {params.max_tokens}",
                field="max_tokens",
            )

    def shortest_output(self, params: SamplingParams) -> int:
        """Tokens of the shortest output that was found for `params.structured`, its end token included."""
        compiled = self._compiled(params.structured)
        tokens = compiled.vocabulary.spell(compiled.plan, self._end_ids(params))
        if tokens is None:
            raise RequestError("structured: the form needs tokens that end the output", field="stop_token_ids")
        return len(tokens) + 1

    def update(self, change: BatchUpdate) -> None:
        """Follow the batch: see `LogitsProcessor`."""
        for slot in change.removed:
            self._outputs.pop(slot, None)
        for origin, to in change.moved:
            if (output := self._outputs.pop(origin, None)) is not None:
                self._outputs[to] = output
        for slot, params, prompt_ids in change.added:
            if params.structured is not None:
                room = self.max_model_len - len(prompt_ids)
                budget = room if params.max_tokens is None else params.max_tokens
                ends = frozenset(change.end_ids.get(slot) or self._end_ids(params))
                self._outputs[slot] = _Output(self._compiled(params.structured), ends, budget)

    def apply(self, logits: Tensor, rows: Sequence[LogitsRow]) -> Tensor:
        """Logits (rows, vocab) with all that may not follow at minus infinity, the others as they were."""
        masks: dict[int, Mask] = {}
        for number, row in enumerate(rows):
            output = self._outputs.get(row.slot)
            if output is not None and output.follow(row.output_ids):
                masks[number] = output.allowed(logits[number])
        if not masks:
            return logits
        concerned = torch.tensor(list(masks), device=logits.device)
        forbidden = torch.from_numpy(~np.stack(list(masks.values()))).to(logits.device)
        return logits.index_copy(0, concerned, logits[concerned].masked_fill(forbidden, float("-inf")))

    def _end_ids(self, params: SamplingParams) -> frozenset[int]:
        own = () if params.ignore_eos else self.tokenizer.stop_token_ids
        return frozenset([*own, *(params.stop_token_ids or ())])

    def _compiled(self, asked: StructuredOutput | None) -> Compiled:
        key = repr(asked)
        if key not in self._forms:
            assert asked is not None
            self._forms[key] = compile_form(asked, self._vocabulary_of(asked))
            while len(self._forms) > _KEPT_FORMS:
                self._forms.popitem(last=False)
        self._forms.move_to_end(key)
        return self._forms[key]

    def _vocabulary_of(self, asked: StructuredOutput) -> _Vocabulary:
        markers = tuple(sorted({*asked.markers} & {*self.tokenizer.special_tokens}))
        if markers not in self._vocabularies:
            self._vocabularies[markers] = _Vocabulary(self.tokenizer, self.vocab_size, markers)
        return self._vocabularies[markers]


class _Vocabulary:
    """A tokenizer as the library sees it, and what each token's bytes can do to JSON. `markers` are special tokens that
    count as their text."""

    def __init__(self, tokenizer: Tokenizer, size: int, markers: tuple[str, ...] = ()) -> None:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise MissingExtra("llguidance", "constrain") from error
        self.size = size
        ends = list(tokenizer.stop_token_ids) or [0]
        self.engine: LLTokenizer = LLTokenizer(
            _with_plain(tokenizer, markers), n_vocab=max(size, tokenizer.vocab_size), eos_token=ends
        )
        self.eos = np.array([token for token in ends if token < size])
        ordinary = set(range(min(size, tokenizer.vocab_size))) - {
            index for text, index in tokenizer.special_tokens.items() if text not in markers
        }
        self.texts = [self.engine.decode_bytes([token]) if token in ordinary else b"" for token in range(size)]
        """Bytes of each token, none of a special one."""
        self.structural = np.array([sum(map(text.count, _STRUCTURAL)) for text in self.texts], np.float32)
        self.words = np.array([_is_word(text) for text in self.texts])
        self._ids = {text: token for token, text in reversed([*enumerate(self.texts)]) if text}
        self.spell = lru_cache(maxsize=4096)(self._spell)

    def _spell(self, text: bytes, end_ids: frozenset[int]) -> tuple[int, ...] | None:
        """The fewest tokens that are the text, none of them an end token; None when there are no such tokens."""
        best: list[tuple[int, ...] | None] = [None] * len(text) + [()]
        for start in reversed(range(len(text))):
            for stop in range(start + 1, min(start + _LONGEST, len(text)) + 1):
                token, rest = self._ids.get(text[start:stop], -1), best[stop]
                if token < 0 or token in end_ids or rest is None:
                    continue
                if (known := best[start]) is None or len(rest) + 1 < len(known):
                    best[start] = (token, *rest)
        return best[0]


def _with_plain(tokenizer: Tokenizer, markers: tuple[str, ...]) -> str:
    """The tokenizer's file, in which these tokens are not special."""
    if not markers:
        return tokenizer.backend.to_str()
    file = json.loads(tokenizer.backend.to_str())
    for token in file["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in markers
    return json.dumps(file)


def _is_word(text: bytes) -> bool:
    """Whether any string of JSON may go on with it."""
    try:
        readable = text.decode()
    except UnicodeDecodeError:
        return False
    return readable.isprintable() and readable != "" and not set(readable) & set('"\\')


@dataclass(frozen=True)
class Compiled:
    """A form's matchers at the beginning (copied, never used themselves) and its shortest output."""

    form: Form
    tokens: LLMatcher
    letters: LLMatcher
    plan: bytes
    vocabulary: _Vocabulary


def compile_form(asked: StructuredOutput, vocabulary: _Vocabulary) -> Compiled:
    """Raises RequestError, naming the field, for a form that cannot be compiled or that no output satisfies."""
    from llguidance import LLMatcher

    form = form_of(asked)
    letters = LLMatcher(byte_tokenizer(), form.grammar, log_level=0)
    if letters.is_error():
        raise RequestError(f"{form.field} is refused: {letters.get_error().strip()}", field=form.field)
    plan = shortest_end(letters, blanks=form.blanks, closings=form.closings)
    if plan is None:
        why = f": {letters.get_error()}" if letters.is_error() else ""
        raise RequestError(f"{form.field} cannot be satisfied: no output of it was found{why}", field=form.field)
    return Compiled(form, LLMatcher(vocabulary.engine, form.grammar, log_level=0), letters, plan, vocabulary)


class _Output:
    """One output in the making: where it stands in its grammar, and how it can end.

    All follows from the output's tokens alone, so neither the batch, a preemption nor rejected drafts change it.
    """

    def __init__(self, compiled: Compiled, end_ids: frozenset[int], budget: int) -> None:
        self._form, self._vocabulary, self._budget = compiled.form, compiled.vocabulary, budget
        self._ends, self._end_ids = np.array(sorted(end_ids)), end_ids
        self._tokens, self._letters = compiled.tokens.deep_copy(), compiled.letters.deep_copy()
        self._ids: list[int] = []
        self._plans: list[bytes | None] = [compiled.plan]  # before each token and after the last
        self._last: tuple[int, Mask] | None = None

    def follow(self, output_ids: Sequence[int]) -> bool:
        """Go to the state after these tokens; False when they are no beginning of an allowed output."""
        wanted = list(output_ids)
        kept = min(len(self._ids), len(wanted))
        while self._ids[:kept] != wanted[:kept]:
            kept -= 1
        if surplus := self._ids[kept:]:
            self._tokens.rollback(len(surplus))
            self._letters.rollback(sum(len(self._vocabulary.texts[token]) for token in surplus))
            del self._ids[kept:], self._plans[kept + 1 :]
            self._last = None
        return all(self._take(token) for token in wanted[kept:])

    def _take(self, token: int) -> bool:
        if self._last is not None and self._last[0] == len(self._ids) and not self._last[1][token]:
            return False
        if token in self._end_ids or self._tokens.validate_tokens([token]) != 1:
            return False
        text, plan = self._vocabulary.texts[token], self._plans[-1]
        self._tokens.consume_token(token)
        self._letters.consume_tokens(list(text))
        self._ids.append(token)
        self._plans.append(None if plan is None else self._plan_after(self._letters, plan, text, _WALKS, _STEPS))
        return True

    def allowed(self, logits: Tensor) -> Mask:
        """Which tokens may come next, (vocab,). None at all when the grammar or its limits leave no way to an end."""
        size = self._vocabulary.size
        bits = np.frombuffer(self._tokens.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, count=size, bitorder="little").astype(bool)
        mask[self._vocabulary.eos] = False
        mask[self._ends] = False
        self._keep_time_to_end(mask, logits)
        if self._tokens.is_accepting():
            mask[self._ends] = True
        self._last = (len(self._ids), mask)
        return mask

    def _keep_time_to_end(self, mask: Mask, logits: Tensor) -> None:
        """Forbid tokens after which no end within the budget is known."""
        plan = self._plans[-1]
        way = None if plan is None else self._vocabulary.spell(plan, self._end_ids)
        left = self._budget - len(self._ids) - 2  # tokens after this one and before the end token
        if plan is None or way is None or len(way) > left + 1:
            mask[:] = False
            return
        if self._form.farthest <= left:
            return
        safe = (self._vocabulary.structural + 1) * self._form.detour <= left - len(way)
        doubtful = (mask & ~safe).nonzero()[0]
        if len(doubtful) == 0:
            return
        if len(way) <= left and self._form.free_strings and self._in_free_string(mask, plan):
            doubtful = doubtful[~self._vocabulary.words[doubtful]]
        best = float(logits.masked_fill(torch.from_numpy(~mask).to(logits.device), -math.inf).max())
        mask[doubtful] = False
        scores = logits[torch.from_numpy(doubtful).to(logits.device)].float()
        values, order = scores.topk(min(_TRIED, len(doubtful)))
        for token in doubtful[order[values >= best - _NEGLIGIBLE].cpu().numpy()].tolist():
            mask[token] = self._can_end_after(token, plan)
        if way:
            mask[way[0]] = True

    def _in_free_string(self, mask: Mask, plan: bytes) -> bool:
        """Inside a string value, not a key, that any word may go on with and a quote may end."""
        value = plan[:1] == b'"' and plan[1:].lstrip()[:1] != b":"
        return value and bool(mask[self._vocabulary.words].all())

    def _can_end_after(self, token: int, plan: bytes) -> bool:
        text = self._vocabulary.texts[token]
        letters = self._letters.deep_copy()
        letters.consume_tokens(list(text))
        self._ids.append(token)  # the budget after it
        try:
            return self._plan_after(letters, plan, text, 1, _TRIAL_STEPS) is not None
        finally:
            self._ids.pop()

    def _plan_after(self, letters: LLMatcher, plan: bytes, text: bytes, walks: int, steps: int) -> bytes | None:
        form = self._form
        return next_plan(
            letters,
            plan,
            text,
            self._fits,
            blanks=form.blanks,
            walks=walks,
            most_steps=steps,
            closings=form.closings,
        )

    def _fits(self, plan: bytes) -> bool:
        way = self._vocabulary.spell(plan, self._end_ids)
        return way is not None and len(way) < self._budget - len(self._ids)  # one is left for the end token
