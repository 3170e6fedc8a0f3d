"""Encoder-decoders through the same engine and scheduler as decoders."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conformance.family import randomise
from conformance.language_model import LanguageModelSuite
from engine import helpers
from engine.helpers import VOCABULARY, greedy, prompt
from gristmill.core import LanguageModel, Prompt, RequestOutput, SamplingParams
from gristmill.engine.encoder_decoder import generation_flops
from gristmill.engine.engine import Engine
from gristmill.engine.llm import LLM
from gristmill.engine.request import Standing
from gristmill.engine.search.beam import BeamSearchParams
from gristmill.engine.speculation.ngram import NgramProposer
from gristmill.errors import RequestError
from gristmill.model.config import EncoderDecoderConfig, NormConfig, PositionConfig
from gristmill.model.encoder_decoder import EncoderDecoder
from gristmill.model.formats.huggingface import read_config, save_huggingface
from model.tiny import CONFIG

T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "d_kv": 10,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "n_positions": 128,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "initializer_range": 0.4,
    "decoder_start_token_id": 2,
}
KINDS = ("t5", "rope", "learned")
kinds = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def model(kind: str = "t5") -> EncoderDecoder:
    """T5, and two whose keys are shared by two query heads. Shared: do not change it."""
    if kind == "t5":
        config = read_config(T5, "t5")[2]
        assert isinstance(config, EncoderDecoderConfig)
    else:
        sides = [
            replace(CONFIG, num_hidden_layers=2, causal=causal, cross_attention=causal) for causal in (False, True)
        ]
        if kind == "learned":
            learned, post = PositionConfig(absolute="learned", offset=2), NormConfig(placement="post", final=False)
            sides = [replace(side, positions=learned, norm=post) for side in sides]
        config = EncoderDecoderConfig(encoder=sides[0], decoder=sides[1], decoder_start_token_id=2)
    built = EncoderDecoder(config)
    built.initialise(0)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "position_bias" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    return built.eval()


def engine(kind: str = "t5", **options: Any) -> Engine:
    return Engine(model(kind), helpers.tokenizer(), **{"kv_cache_tokens": 256, **options})


def run(target: Engine, requests: Sequence[tuple[Prompt, SamplingParams]]) -> list[RequestOutput]:
    """All at once; both pools are whole after each step, and free at the end."""
    found = helpers.run(target, requests)
    assert target.sources is not None
    assert target.sources.pool.num_free == target.sources.pool.num_blocks
    return found


def ids_of(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def plain(kind: str, source: Sequence[int], count: int) -> list[int]:
    """A whole pass for each token: no cache, no batch, no engine."""
    target = [2]
    for _ in range(count):
        target.append(_next_token(kind, tuple(source), tuple(target)))
    return target[1:]


@functools.lru_cache(100_000)
@torch.inference_mode()
def _next_token(kind: str, source: tuple[int, ...], target: tuple[int, ...]) -> int:
    return int(model(kind)(torch.tensor([source]), torch.tensor([target]))[0, -1].argmax())


@contextmanager
def encoder_runs(kind: str = "t5") -> Iterator[list[int]]:
    """How many tokens each run of the encoder reads."""
    runs: list[int] = []

    def record(_: Any, args: tuple[Any, ...]) -> None:
        runs.append(len(args[0]))

    handle = model(kind).encoder.layers[0].register_forward_pre_hook(record)
    yield runs
    handle.remove()


@kinds
def test_a_batch_gives_the_tokens_of_whole_passes(kind: str) -> None:
    sources = [prompt(length, seed=length) for length in (1, 7, 16, 17, 40)]
    found = run(engine(kind), [(source, greedy(max_tokens=10)) for source in sources])
    assert ids_of(found) == [plain(kind, source, 10) for source in sources]
    assert [output.prompt_token_ids for output in found] == sources
    assert len({tuple(ids) for ids in ids_of(found)}) > 2  # the sources matter


@pytest.mark.parametrize("kv_cache_dtype", [None, torch.bfloat16, torch.int8])
def test_sampled_completions_depend_on_their_request_alone(kv_cache_dtype: torch.dtype | None) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=6, ignore_eos=True)
    requests = [(prompt(length, seed=length), params) for length in (5, 12, 30)]
    alone = [run(engine(kv_cache_dtype=kv_cache_dtype), [request])[0] for request in requests]
    together = run(engine(kv_cache_dtype=kv_cache_dtype, max_num_batched_tokens=7, max_num_seqs=4), requests)
    assert ids_of(together) == ids_of(alone)
    assert len({tuple(ids) for ids in ids_of(alone)}) == 9


def test_the_encoder_reads_the_sources_of_a_step_together_and_each_once() -> None:
    sources = [prompt(length, seed=length) for length in (5, 9, 20)]
    target = engine()
    with encoder_runs() as runs:
        run(target, [(source, greedy()) for source in sources])
        assert runs == [34]
        found = run(target, [(sources[1], greedy(n=2))])  # nobody needed its blocks since
        assert runs == [34]
        run(engine(prefix_caching=False), [(sources[1], greedy()), (sources[1], greedy())])
        assert runs == [34, 18]
    assert ids_of(found) == [plain("t5", sources[1], 8)] * 2


def test_what_is_known_of_a_source_stays_with_its_salt_and_with_the_source() -> None:
    target, source = engine(block_size=2), prompt(9)
    with encoder_runs() as runs:
        for salt in ("a", "b", "a"):
            request = target.add(source, greedy(), standing=Standing(cache_salt=salt))
            while target.has_unfinished():
                target.step()
            target.abort(request)
        assert runs == [9, 9]
    decoded = [2, *plain("t5", source, 8)]

    def known(of: list[int], salt: str | None) -> int:
        request = target.add(of, greedy(), standing=Standing(cache_salt=salt))
        root = target.scheduler.waiting[0].cache_root
        target.abort(request)
        assert root is not None
        return len(target.pool.match(decoded, root, 8)[0])

    # what the decoder computed of the same tokens is another source's, or another tenant's
    assert [known(source, "a"), known(source, "c"), known(source, None), known(prompt(9, seed=1), "a")] == [4, 0, 0, 0]


def test_completions_share_the_blocks_of_their_source() -> None:
    target, source = engine(), prompt(40)
    target.add(source, greedy(n=4))
    assert target.sources is not None
    target.step()
    assert len(target.scheduler.running) == 4
    assert target.sources.pool.num_blocks - target.sources.pool.num_free == 3
    while target.has_unfinished():
        target.step()
        target.check_integrity()
    assert target.sources.pool.num_free == target.sources.pool.num_blocks


@kinds
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preempted_sequences_go_on_as_if_nothing_had_been(kind: str, prefix_caching: bool) -> None:
    target = engine(kind, kv_cache_tokens=48, block_size=4, prefix_caching=prefix_caching)
    requests = [(prompt(5 + i, seed=i), greedy(max_tokens=20)) for i in range(4)]
    assert ids_of(run(target, requests)) == [plain(kind, source, 20) for source, _ in requests]
    assert target.scheduler.num_preempted > 0


def test_a_request_waits_until_its_source_fits() -> None:
    target = engine(kv_cache_tokens=64)
    requests = [(prompt(40, seed=i), greedy(max_tokens=4)) for i in range(5)]  # three of four blocks each
    for source, params in requests:
        target.add(source, params)
    finished: list[RequestOutput] = []
    while target.has_unfinished():
        finished += [output for output in target.step() if output.finished]
        assert len(target.scheduler.running) <= 1
        target.check_integrity()
    assert ids_of(finished) == [plain("t5", source, 4) for source, _ in requests]


def test_sources_of_one_step_keep_to_the_limit_and_a_longer_one_goes_alone() -> None:
    sources = [prompt(length, seed=length) for length in (30, 8, 9, 5)]
    with encoder_runs() as runs:
        found = run(engine(max_num_batched_tokens=16), [(source, greedy(max_tokens=12)) for source in sources])
    assert runs == [30, 8, 14]
    assert ids_of(found) == [plain("t5", source, 12) for source in sources]


@pytest.mark.parametrize("options", [{}, {"kv_cache_tokens": 64, "max_model_len": 20}])
def test_a_source_that_fits_nowhere_is_refused(options: dict[str, int]) -> None:
    target = engine(**options)
    most = min(128, options.get("kv_cache_tokens", 128))
    with pytest.raises(RequestError, match=f"{most + 1} tokens.* is {most}") as caught:
        target.add(prompt(most + 1), greedy())
    assert (caught.value.field, caught.value.code) == ("prompt", "context_length_exceeded")
    assert run(target, [(prompt(most), greedy())])[0].finished
    with pytest.raises(RequestError, match="empty"):
        target.add("", greedy())
    with pytest.raises(RequestError, match="300"):
        target.add([300], greedy())
    with pytest.raises(RequestError, match="exceed the context"):
        target.add(prompt(3), greedy(max_tokens=target.max_model_len))
    assert not target.has_unfinished()


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_random_schedules_with_aborts_leave_both_pools_whole(data: st.DataObject) -> None:
    target = engine(
        kv_cache_tokens=data.draw(st.sampled_from([40, 64, 96])),
        block_size=data.draw(st.sampled_from([1, 4, 8])),
        max_num_seqs=data.draw(st.integers(1, 5)),
        max_num_batched_tokens=data.draw(st.integers(1, 30)),
        prefix_caching=data.draw(st.booleans()),
    )
    assert target.sources is not None
    sources = [prompt(length, seed=length) for length in (1, 6, 17, 33, 40)]
    expected, found, steps = {}, {}, 0
    for _ in range(data.draw(st.integers(1, 6))):
        source, count = data.draw(st.sampled_from(sources)), data.draw(st.integers(1, 10))
        request = target.add(source, greedy(max_tokens=count, n=data.draw(st.integers(1, 3))))
        expected[request] = plain("t5", source, count)
        for _ in range(data.draw(st.integers(0, 3))):
            found |= {output.request_id: output for output in target.step() if output.finished}
            target.check_integrity()
        if data.draw(st.integers(0, 3)) == 0:
            gone = data.draw(st.sampled_from(sorted(expected)))
            target.abort(gone)
            del expected[gone]
            target.check_integrity()
    while target.has_unfinished():
        found |= {output.request_id: output for output in target.step() if output.finished}
        target.check_integrity()
        steps += 1
        assert steps < 1000, "it hangs"
    for request, tokens in expected.items():
        assert all(ids == tokens for ids in ids_of([found[request]]))
    assert target.pool.num_free == target.pool.num_blocks
    assert target.sources.pool.num_free == target.sources.pool.num_blocks


def test_drafts_are_verified_against_the_source() -> None:
    requests = [(prompt(length, seed=length), greedy(max_tokens=30)) for length in (5, 20)]
    target = engine(proposer=NgramProposer())
    assert ids_of(run(target, requests)) == [plain("t5", source, 30) for source, _ in requests]
    assert target.metrics.drafted_tokens > 0


def test_generation_ends_when_its_operations_are_spent_the_encoders_included() -> None:
    config, source = model().config, prompt(12)
    spent = generation_flops(config, 12)
    found = run(engine(), [(source, greedy(max_tokens=20, max_flops=spent(3)))])[0].outputs[0]
    assert (len(found.token_ids), found.stop_reason) == (4, "max_flops")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        model()(torch.tensor([source]), torch.tensor([[2, *found.token_ids[:-1]]]))
    # the counter takes the masked half of the decoder's own scores for work
    assert counter.get_total_flops() == pytest.approx(spent(4), rel=0.003)


# The front


@pytest.fixture(scope="module")
def llm() -> LLM:
    with tempfile.TemporaryDirectory() as directory:
        return LLM(save(Path(directory)))


def save(directory: Path) -> Path:
    save_huggingface(model(), directory, stop_token_ids=helpers.tokenizer().stop_token_ids)
    helpers.tokenizer().save(directory)
    return directory


def test_scores_are_those_of_a_plain_pass(llm: LLM) -> None:
    pairs = [(prompt(5), prompt(7, seed=1)), (prompt(30, seed=2), prompt(1, seed=3))]
    for (source, target), score in zip(pairs, llm.score_many(pairs), strict=True):
        with torch.inference_mode():
            logits = model()(torch.tensor([source]), torch.tensor([[2, *target[:-1]]]))[0]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).squeeze(1)
        assert score.token_logprobs == pytest.approx(wanted.tolist(), abs=1e-4)
    with pytest.raises(RequestError, match="the encoder reads 128"):
        llm.score(prompt(129), prompt(3))


def test_embeddings_are_means_of_encoder_states(llm: LLM) -> None:
    text = "The river runs"
    with torch.inference_mode():
        mean = model().encoder(torch.tensor([helpers.tokenizer().encode(text)]))[0].mean(dim=0)
    assert llm.embed(["to the far sea, once", text])[1] == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)


def test_what_does_not_go_with_an_encoder_is_refused_in_a_sentence(llm: LLM, tmp_path: Path) -> None:
    assert "encoder" in llm.path
    assert llm.room_after(prompt(9)) == llm.max_model_len - 1
    with pytest.raises(RequestError, match="no probabilities") as caught:
        llm.generate("The river", greedy(prompt_logprobs=1))
    assert caught.value.field == "prompt_logprobs"
    with pytest.raises(RequestError, match="not searched"):
        llm.beam_search("The river", BeamSearchParams(width=2, max_tokens=3))
    with pytest.raises(RequestError, match="EncoderDecoder"):
        _ = llm.model
    with pytest.raises(RequestError, match="take ngram"):
        LLM(save(tmp_path), speculation="early-exit:1")
    replace(helpers.tokenizer(), chat_template=None).save(tmp_path)
    with pytest.raises(RequestError, match="encoder-decoder without a chat template"):
        LLM(tmp_path).chat([{"role": "user", "content": "The river"}])


class TestEncoderDecoder(LanguageModelSuite):
    """What every language model does, but for chains: an answer's beginning cannot be moved into the source."""

    context_length = 128
    vocab_size = VOCABULARY

    def make(self) -> LanguageModel:
        with tempfile.TemporaryDirectory() as directory:
            return LLM(save(Path(directory)))

    def decode(self, model: LanguageModel, ids: Sequence[int]) -> str | None:
        return helpers.tokenizer().decode(ids)

    def test_score_is_additive_over_a_split(self, model: LanguageModel) -> None:
        whole = model.score(self.prompts[0], " to the far sea")
        for cut in range(1, len(whole.token_ids)):
            part = model.score(self.prompts[0], whole.token_ids[:cut])
            assert part.token_logprobs == pytest.approx(whole.token_logprobs[:cut], abs=1e-4)


del LanguageModelSuite  # a suite, not a test


# Other libraries


@pytest.mark.peer
@pytest.mark.parametrize("family", ["T5", "MT5", "Bart", "MBart"])
def test_the_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "decoder_start_token_id": 2}
    if family.endswith("T5"):
        sizes |= {"d_kv": 10, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    else:
        sizes |= {"encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    config = getattr(transformers, f"{family}Config")(**sizes)
    twin = randomise(getattr(transformers, f"{family}ForConditionalGeneration")(config))
    twin.generation_config = transformers.GenerationConfig(decoder_start_token_id=2, pad_token_id=0)
    twin.save_pretrained(tmp_path)
    helpers.tokenizer().save(tmp_path)

    def theirs(source: list[int], **options: Any) -> list[int]:
        with torch.inference_mode():
            ids = twin.generate(torch.tensor([source]), do_sample=False, max_new_tokens=12, **options)
        return [int(token) for token in ids[0, 1:]]

    sources = [prompt(length, seed=length) for length in (3, 9, 17)]
    wanted = [theirs(source) for source in sources]
    found = LLM(tmp_path).generate(sources, greedy(max_tokens=12))
    assert ids_of(found) == wanted
    assert [output.outputs[0].text for output in found] == [helpers.tokenizer().decode(ids) for ids in wanted]
    penalised = [theirs(source, repetition_penalty=1.5) for source in sources]
    assert ids_of(LLM(tmp_path).generate(sources, greedy(max_tokens=12, repetition_penalty=1.5))) == penalised
    end = wanted[0][4]
    (ended,) = LLM(tmp_path).generate([sources[0]], greedy(max_tokens=12, stop_token_ids=[end]))
    assert ended.outputs[0].token_ids == theirs(sources[0], eos_token_id=end)
