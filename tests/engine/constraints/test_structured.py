"""Every output has the form that was asked for, and ends in time; nothing else about the distribution changes."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import helpers
from engine.constraints.steps import asked, begin, constraints, generate, of, random_logits, row
from gristmill.core import BatchUpdate, LogitsRow, SamplingParams, StructuredOutput
from gristmill.engine.constraints.processor import Constraints
from gristmill.engine.engine import Engine
from gristmill.engine.speculation.ngram import NgramProposer
from gristmill.errors import GristmillError, MissingExtra, RequestError
from gristmill.model.load import load_tokenizer

CLOSED = {"additionalProperties": False}
TREE = {
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {"v": {"type": "integer"}, "k": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
            "required": ["v", "k"],
            **CLOSED,
        }
    },
    "$ref": "#/$defs/tree",
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "minItems": 2}},
    "required": ["name", "tags"],
    **CLOSED,
}
SCHEMAS: dict[str, Any] = {
    "person": PERSON,
    "tree": TREE,
    "anything": {},
    "enum": {"enum": ["red", "green", 3, None]},
    "numbers": {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0, "maximum": 9}, "minItems": 2},
    "pattern": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
    "lengths": {"type": "array", "items": {"type": "string", "minLength": 3, "maxLength": 6}, "maxItems": 3},
    "format": {"type": "object", "properties": {"d": {"type": "string", "format": "date"}}, "required": ["d"]},
    "any of": {"anyOf": [{"type": "string", "maxLength": 5}, PERSON, {"type": "integer", "multipleOf": 7}]},
    "all of": {"allOf": [PERSON | {"additionalProperties": True}, {"type": "object", "required": ["age"]}]},
    "free keys": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1},
    "optional": {"type": "object", "properties": {"a": {}, "long": PERSON | {"minProperties": 2}}, **CLOSED},
}


def valid(text: str, schema: Any) -> Any:
    value = json.loads(text)
    jsonschema.validate(value, schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    return value


def schemas() -> st.SearchStrategy[Any]:
    """JSON schemas that can be satisfied, nested, with optional parts much longer than the rest."""
    short = st.text('abq \\"é', max_size=3)
    leaves = st.one_of(
        st.sampled_from([{"type": kind} for kind in ("integer", "number", "boolean", "null", "string")]),
        st.builds(
            lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more}, *[st.integers(0, 9)] * 2
        ),
        st.lists(st.one_of(short, st.integers(-(2**53), 2**53), st.booleans()), min_size=1, max_size=4).map(
            lambda v: {"enum": v}
        ),
        st.builds(
            lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
            st.integers(-50, 50),
            st.integers(0, 99),
        ),
        st.text("xyz", min_size=20, max_size=40).map(lambda v: {"const": v}),
    )

    def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.builds(
            lambda properties, optional: {
                "type": "object",
                "properties": properties,
                "required": [key for key in properties if key not in optional],
                **CLOSED,
            },
            st.dictionaries(short, inner, max_size=4),
            st.sets(short, max_size=3),
        )

    def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        arrays = st.builds(
            lambda item, low, more: {"type": "array", "items": item, "minItems": low, "maxItems": low + more},
            inner, st.integers(0, 3), st.integers(0, 5),
        )  # fmt: skip
        return st.one_of(objects(inner), arrays, st.lists(inner, min_size=1, max_size=3).map(lambda v: {"anyOf": v}))

    return st.recursive(leaves, nested, max_leaves=8)


@settings(max_examples=40, deadline=None)
@given(schemas(), st.integers(0, 40), st.integers(0, 99), st.sampled_from([0.0, 1.0, 8.0]), st.booleans())
def test_any_schema_logits_and_budget_give_valid_json_in_time(
    schema: Any, spare: int, seed: int, scale: float, compact: bool
) -> None:
    target = constraints()
    shortest = target.shortest_output(asked(json_schema=schema, compact=compact))
    params = asked(min(shortest + spare, 500), json_schema=schema, compact=compact)
    valid(generate(target, params, random_logits(target, seed, scale), seed), schema)
    with pytest.raises(RequestError, match="shortest output") as refused:
        target.validate(asked(shortest - 1, json_schema=schema, compact=compact))
    assert refused.value.field == "max_tokens"


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("spare", [0, 3, 60])
def test_schemas_of_all_kinds(name: str, spare: int) -> None:
    target, schema = constraints(), SCHEMAS[name]
    shortest = target.shortest_output(asked(json_schema=schema))
    for seed in range(3):
        valid(generate(target, asked(shortest + spare, json_schema=schema), random_logits(target, seed)), schema)


@pytest.mark.asset
@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_over_a_real_vocabulary(name: str, smollm2: Constraints) -> None:
    schema = SCHEMAS[name]
    shortest = smollm2.shortest_output(asked(json_schema=schema))
    for spare in (0, 20):
        valid(generate(smollm2, asked(shortest + spare, json_schema=schema), random_logits(smollm2, spare)), schema)


@pytest.fixture(scope="module")
def smollm2() -> Constraints:
    return of(load_tokenizer("smollm2-135m"))


@torch.inference_mode()
def test_a_model_chooses_among_what_is_allowed() -> None:
    target, ids = constraints(), helpers.prompt(5)
    params, output = begin(target, asked(40, json_schema=PERSON)), []
    for _ in range(40):
        logits = helpers.model()(torch.tensor(ids + output))[-1]
        token = int(row(target, logits, output).argmax())
        if token in target.tokenizer.stop_token_ids:
            break
        output.append(token)
    assert len(output) < (params.max_tokens or 0)
    valid(target.tokenizer.decode(output), PERSON)


@pytest.mark.parametrize("speculation", [False, True])
def test_an_engine_serves_forms_beside_free_text(speculation: bool) -> None:
    """Batched with others, from a pool that preempts, drafted for or not: each output is what it is alone."""

    def build() -> Engine:
        target = helpers.engine(kv_cache_tokens=128)
        if speculation:
            target.speculate(NgramProposer(min_n=1))
        return target

    forms = [{"json_schema": PERSON}, {"regex": "(ab)+c"}, {"choice": ["two", "twice"]}, {"json_schema": TREE}]
    wanted = [SamplingParams(structured=StructuredOutput(**form), max_tokens=45, seed=3) for form in forms]
    requests = [(helpers.prompt(9, seed), params) for seed, params in enumerate([*wanted, helpers.greedy()])]
    together = [output.outputs[0] for output in helpers.run(build(), requests)]
    assert [output.finish_reason for output in together] == ["stop"] * 4 + ["length"]
    valid(together[0].text, PERSON)
    assert re.fullmatch("(ab)+c", together[1].text)
    assert together[2].text in ("two", "twice")
    valid(together[3].text, TREE)
    assert [helpers.only(build(), *request).token_ids for request in requests] == [o.token_ids for o in together]


@pytest.mark.parametrize("seed", range(4))
def test_regex_choice_grammar_and_calls(seed: int) -> None:
    target = constraints()

    def text(max_tokens: int, **fields: Any) -> str:
        return generate(target, asked(max_tokens, **fields), random_logits(target, seed))

    assert re.fullmatch(r"([a-z]+\s){3}[0-9]{2,4}x|q{30}", text(40, regex=r"([a-z]+\s){3}[0-9]{2,4}x|q{30}"))
    assert text(40, choice=['"a"\n', "twice as far", "三"]) in ('"a"\n', "twice as far", "三")
    lark = 'start: sum\nsum: term ("+" term)*\nterm: /[0-9]+/ | "(" sum ")"'
    assert re.sub(r"[0-9+]+|\(\)", "", _reduced(text(30, grammar=lark))) == ""
    assert re.fullmatch(r"(ab)+c", text(20, grammar='root ::= "ab" root | "abc"'))
    assert isinstance(json.loads(text(40, json_object=True)), dict)
    call = json.loads(
        text(80, tools=[{"name": "see", "parameters": PERSON}, {"function": {"name": "grow", "parameters": TREE}}])
    )
    assert sorted(call) == ["arguments", "name"]
    jsonschema.validate(call["arguments"], {"see": PERSON, "grow": TREE}[call["name"]])


def _reduced(text: str) -> str:
    while (shorter := re.sub(r"\([0-9+]+\)", "1", text)) != text:
        text = shorter
    return text


def test_probability_ratios_of_allowed_tokens_are_kept() -> None:
    target = constraints()
    begin(target, asked(100, regex="[a-z ]+"))
    logits = torch.randn(2, target.vocab_size)
    before = logits.clone()
    result = target.apply(logits, [LogitsRow(0, [1], []), LogitsRow(7, [1], [])])
    kept = result[0] > -torch.inf
    assert torch.equal(logits, before)
    assert torch.equal(result[1], logits[1])  # nobody asked in slot 7
    assert torch.equal(result[0][kept], logits[0][kept])
    texts = [target.tokenizer.decode([token]) for token in range(target.vocab_size)]
    special = set(target.tokenizer.special_tokens.values())
    assert kept.tolist() == [bool(re.fullmatch("[a-z ]+", text)) and i not in special for i, text in enumerate(texts)]
    assert target.apply(logits[:1], [LogitsRow(7, [1], [])]) is not None
    assert target.apply(logits, [LogitsRow(7, [1], []), LogitsRow(8, [1], [])]) is logits


@pytest.mark.peer
def test_equals_transformers_prefix_constrained_logits() -> None:
    from transformers import PrefixConstrainedLogitsProcessor

    target, choices = constraints(), [b"the river runs", b"the sea", b"two and two make four"]
    begin(target, asked(64, choice=[choice.decode() for choice in choices]))
    ends, texts = list(target.tokenizer.stop_token_ids), target._vocabulary_of(StructuredOutput(json_object=True)).texts

    def may_follow(_: int, ids: torch.Tensor) -> list[int]:
        said = b"".join(texts[token] for token in ids.tolist())
        starts = [i for i, text in enumerate(texts) if text and any(c.startswith(said + text) for c in choices)]
        return starts + (ends if said in choices else [])

    theirs, output = PrefixConstrainedLogitsProcessor(may_follow, 1), []
    for seed in range(20):
        logits = torch.randn(target.vocab_size, generator=torch.Generator().manual_seed(seed))
        mine = row(target, logits, output)
        assert torch.equal(mine, theirs(torch.tensor([output], dtype=torch.long), logits[None])[0])
        output.append(int(mine.argmax()))
        if output[-1] in ends:
            return
    raise AssertionError("no end")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=3, max_size=12), st.sampled_from([PERSON, TREE, SCHEMAS["any of"]]))
def test_drafts_and_their_rejection_leave_no_trace(goes_back: list[int], schema: Any) -> None:
    """Rows of drafts give what a slot that saw only those tokens gives, however far the output went back."""
    target = constraints()
    params = asked(60, json_schema=schema)
    begin(target, params)
    output: list[int] = []
    for seed, back in enumerate(goes_back):
        logits = random_logits(target, seed)(0)
        result = row(target, logits, output)
        begin(target, params, slot=1)
        assert torch.equal(result, row(target, logits, output, slot=1))
        token = int(result.argmax())
        if token in target.tokenizer.stop_token_ids:
            break
        output.append(token)
        del output[max(0, len(output) - (back if back > 3 else 0)) :]


def test_rows_after_a_forbidden_draft_are_left_alone() -> None:
    target = constraints()
    begin(target, asked(60, choice=["the sea", "the river"]))
    the, sea, end = (
        target._vocabulary_of(StructuredOutput(json_object=True))._ids[text] for text in (b"t", b"s", b"a")
    )
    logits = torch.randn(3, target.vocab_size)
    rows = [LogitsRow(0, [1], []), LogitsRow(0, [1], [sea]), LogitsRow(0, [1], [sea, end])]
    result = target.apply(logits, rows)
    assert torch.equal(result[1:], logits[1:])
    assert row(target, logits[0], [the])[sea] == -torch.inf


def test_slots_move_and_are_freed() -> None:
    target = constraints()
    begin(target, asked(9, choice=["one"]), slot=3)
    begin(target, asked(9, choice=["two"]), slot=4)
    first = target._vocabulary_of(StructuredOutput(json_object=True))._ids[b"o"]
    target.update(BatchUpdate(removed=[3], moved=[(4, 3)], added=[(4, asked(9, choice=["once"]), [1])]))
    zeros = torch.zeros(target.vocab_size)
    assert row(target, zeros, [], slot=3)[first] == -torch.inf
    assert row(target, zeros, [], slot=4)[first] == 0
    target.update(BatchUpdate(removed=[3, 4]))
    assert torch.equal(row(target, zeros, [], slot=3), zeros)


def test_end_tokens_come_only_where_the_form_is_complete() -> None:
    target = constraints()
    letter = target._vocabulary_of(StructuredOutput(json_object=True))._ids[b"c"]
    params = SamplingParams(structured=StructuredOutput(regex="a[bc]*b"), max_tokens=9, stop_token_ids=[letter])
    begin(target, params)
    ends = [*target.tokenizer.stop_token_ids, letter]
    a, b = (
        target._vocabulary_of(StructuredOutput(json_object=True))._ids[b"a"],
        target._vocabulary_of(StructuredOutput(json_object=True))._ids[b"b"],
    )
    for output, complete in (([], False), ([a], False), ([a, b], True), ([a, b, b], True)):
        assert (row(target, torch.zeros(target.vocab_size), output)[ends] == 0).tolist() == [complete] * len(ends)


@pytest.mark.parametrize("schema", [PERSON, TREE], ids=["person", "tree"])
def test_white_space_is_bounded(schema: Any) -> None:
    """Logits that want blanks and line breaks above all get some, and then the JSON goes on."""
    target = constraints()
    blank = [
        float(text.strip() == b"" != text) * 50
        for text in target._vocabulary_of(StructuredOutput(json_object=True)).texts
    ]
    text = generate(target, asked(400, json_schema=schema), lambda _: torch.tensor(blank))
    valid(text, schema)
    assert not re.search(r"\n\s*\n|[ \t]{17}", re.sub(r'"[^"]*"', '""', text))
    assert re.search(r"[ \t]{16}", text)
    compact = generate(target, asked(400, json_schema=schema, compact=True), lambda _: torch.tensor(blank))
    assert not re.search(r"\s", re.sub(r'"[^"]*"', '""', compact))


@pytest.mark.parametrize(
    ("fields", "field", "told"),
    [
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 2}}, "structured.json_schema", "minimum"),
        ({"json_schema": "{"}, "structured.json_schema", "not JSON"),
        ({"json_schema": "[]"}, "structured.json_schema", "an object"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "structured.json_schema", "uniqueItems"),
        ({"json_schema": {"$ref": "#/$defs/no"}}, "structured.json_schema", "/$defs/no"),
        ({"json_schema": {"const": float("nan")}}, "structured.json_schema", "not JSON"),
        ({"json_schema": {"x-guidance": {}}}, "structured.json_schema", "x-guidance"),
        ({"json_schema": {"enum": [2**53 + 1]}}, "structured.json_schema", "2**53"),
        ({"json_schema": {"enum": []}}, "structured.json_schema", "refused"),
        ({"json_schema": {"type": "object", "minProperties": 2}}, "structured.json_schema", "minProperties"),
        ({"json_schema": {"$defs": {"r": {"type": "array", "items": {"$ref": "#/$defs/r"}, "minItems": 1}},
                          "$ref": "#/$defs/r"}}, "structured.json_schema", "cannot be satisfied"),
        ({"json_schema": {"type": "string", "minLength": 10**8}}, "structured.json_schema", "cannot be satisfied"),
        ({"json_schema": {"const": "x" * (1 << 19)}}, "structured.json_schema", "characters"),
        ({"regex": ""}, "structured.regex", "empty"),
        ({"regex": "a(b"}, "structured.regex", "unclosed group"),
        ({"regex": "(?=a)b"}, "structured.regex", "look-around"),
        ({"regex": r"[^\s\S]"}, "structured.regex", "cannot be satisfied"),
        ({"grammar": 'root ::= "a'}, "structured.grammar", "refused"),
        ({"grammar": "start: foo"}, "structured.grammar", "foo"),
        ({"grammar": 'start: "a" x\nx: "b" x'}, "structured.grammar", "cannot be satisfied"),
        ({"choice": []}, "structured.choice", "one text or more"),
        ({"choice": ["a", ""]}, "structured.choice", "one text or more"),
        ({"tools": []}, "structured.tools", "empty"),
        ({"tools": [{"parameters": {}}]}, "structured.tools", "name"),
        ({"tools": [{"name": "f"}, {"name": "f"}]}, "structured.tools", "[1]"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_by_name(fields: dict[str, Any], field: str, told: str) -> None:
    with pytest.raises(RequestError) as refused:
        constraints().validate(asked(400, **fields))
    assert refused.value.field == field
    assert told in str(refused.value)
    assert field in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"ignore_eos": True}, "ignore_eos"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"thinking_budget": 5}, "structured"),
        ({"max_tokens": 2}, "max_tokens"),
        ({"stop_token_ids": list(range(3, helpers.VOCABULARY))}, "stop_token_ids"),
    ],
)
def test_parameters_that_contradict_a_form_are_refused(changes: dict[str, Any], field: str) -> None:
    params = {"structured": StructuredOutput(choice=["far"]), "max_tokens": 20, "stop_token_ids": None, **changes}
    with pytest.raises(RequestError) as refused:
        constraints().validate(SamplingParams(**params))
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "structured"),
        ({"regex": "a", "choice": ["b"]}, "structured"),
        ({"choice": "abc"}, "structured.choice"),
        ({"json_schema": 3}, "structured.json_schema"),
        ({"json_shema": {}}, "structured.json_shema"),
    ],
)
def test_exactly_one_form_of_its_type_is_taken(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams.from_dict({"structured": fields})
    assert refused.value.field == field


def test_a_mapping_becomes_a_form() -> None:
    params = SamplingParams.from_dict({"structured": {"json_object": True, "compact": True}})
    assert params.structured == StructuredOutput(json_object=True, compact=True)


def test_without_the_library_its_install_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    target = of(helpers.tokenizer())
    target.validate(SamplingParams())
    with pytest.raises(MissingExtra, match=r"gristmill\[constrain\]"):
        target.validate(asked(json_object=True))
    assert issubclass(MissingExtra, GristmillError)
