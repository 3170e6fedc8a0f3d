"""The engine: requests in, tokens out, many requests in one forward.

`add` queues a request, `step` computes one batch and returns what advanced, `abort` frees a request at once. One
thread owns an engine.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ids
from typing import cast

import torch
from torch import Tensor

from gristmill.core import LogitsProcessor, Prompt, RequestOutput, SamplingParams
from gristmill.engine import encoder_decoder
from gristmill.engine.adapters import Adapters
from gristmill.engine.admission import Admission
from gristmill.engine.choosing import Chooser
from gristmill.engine.constraints.processor import Constraints
from gristmill.engine.handover import Blocks, Handover, export_completion, restore_completion
from gristmill.engine.memory.block_pool import BlockPool, salt
from gristmill.engine.memory.paged_cache import Chunk
from gristmill.engine.memory.sources import SourcePool
from gristmill.engine.metrics.counters import EngineMetrics
from gristmill.engine.pacing import Pacing
from gristmill.engine.request import Completion, Request, Standing
from gristmill.engine.runner import RunnerFactory
from gristmill.engine.sampling.logprobs import prompt_logprobs
from gristmill.engine.scheduling.policies import Policy
from gristmill.engine.scheduling.scheduler import Scheduled, Scheduler
from gristmill.engine.speculation.adaptive import AdaptiveProposer
from gristmill.engine.speculation.proposer import Proposer
from gristmill.errors import RequestError
from gristmill.model.encoder_decoder import EncoderDecoder
from gristmill.model.lora.low_rank import Lora
from gristmill.model.transformer import Transformer
from gristmill.tokens.tokenizer import Tokenizer


class Engine:
    """Runs one model for any number of requests.

    max_model_len: most tokens of a prompt and its output; None takes the model's context, or what fits in memory.
    kv_cache_tokens: how many tokens' keys and values fit in memory, over all requests. In an encoder-decoder both are
    the decoder's; as much memory again holds what it reads of prompts. kv_cache_dtype: None for the
    weights' type, or float32, bfloat16, int8. block_size: tokens of a block of that memory.
    max_num_seqs: most sequences of one step. max_num_batched_tokens: most tokens of one forward; longer prompts are
    computed in parts. prefix_caching: keep what was computed of prompts for requests that begin alike.
    policy: who goes first; None for first come, first served. itl_stretch: at 2, prompts are cut so that a step takes
    no more than about twice as long as without them; None lets them go as fast as they can.
    proposer: drafts tokens that the model then verifies several at a time. processors: further changes of logits.
    runner: what computes steps; None for the plain PyTorch forward.
    seed: requests without a seed of their own draw theirs from it, in order of arrival. clock: seconds, for tests.

    Raises RequestError naming an option that is out of range.
    """

    def __init__(
        self,
        model: Transformer | EncoderDecoder,
        tokenizer: Tokenizer,
        *,
        max_model_len: int | None = None,
        kv_cache_tokens: int | None = None,
        kv_cache_dtype: torch.dtype | None = None,
        block_size: int = 16,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        prefix_caching: bool = True,
        policy: Policy | None = None,
        itl_stretch: float | None = None,
        proposer: Proposer | None = None,
        processors: Ids[LogitsProcessor] = (),
        runner: RunnerFactory | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pair = model.config if isinstance(model, EncoderDecoder) else None
        """The configuration of an encoder-decoder, whose encoder reads the prompts."""
        self.config = model.config.decoder if isinstance(model, EncoderDecoder) else model.config
        self.model, self.tokenizer, context = model, tokenizer, self.config.context
        _need_at_least_one(kv_cache_tokens=kv_cache_tokens, max_num_seqs=max_num_seqs, block_size=block_size)
        _need_at_least_one(max_model_len=max_model_len, max_num_batched_tokens=max_num_batched_tokens)
        if itl_stretch is not None and not itl_stretch > 1:
            raise RequestError(f"itl_stretch must be above 1, got {itl_stretch}", field="itl_stretch")
        if max_model_len is not None and max_model_len > min(context, kv_cache_tokens or context):
            raise RequestError(
                f"max_model_len {max_model_len} exceeds the model's context of {context}"
                + (f" or the {kv_cache_tokens} kv_cache_tokens" if kv_cache_tokens else ""),
                field="max_model_len",
            )
        self.max_model_len = max_model_len or min(context, kv_cache_tokens or context)
        # a whole request always fits, so the oldest one can always go on
        num_blocks = -(-(kv_cache_tokens or max(self.max_model_len, 16_384)) // block_size)
        self.runner = (runner or encoder_decoder.torch_runner(model, kv_cache_dtype))(num_blocks, block_size)
        self.adapters = Adapters(self.runner, self.config, self.pair)
        """What requests may name as their adapter."""
        self.pool = BlockPool(num_blocks, block_size)
        self.sources = SourcePool(num_blocks, block_size, caching=prefix_caching) if self.pair else None
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            policy=policy,
            prefix_caching=prefix_caching,
            sources=self.sources,
        )
        vocabulary = self.config.vocab_size
        own = Constraints(tokenizer, vocabulary, self.max_model_len)
        self.chooser = Chooser(self.runner, tokenizer, vocabulary, own, processors)
        self.admission = Admission(
            self.config, self.pair, tokenizer, self.chooser.sampler, self.max_model_len, self.sources
        )
        self.pacing, self.metrics, self.clock = Pacing(itl_stretch), EngineMetrics(), clock
        self.proposer: AdaptiveProposer | None = None
        if proposer is not None:
            self.speculate(proposer)
        self._requests: dict[str, Request] = {}
        self._late: list[Completion] = []  # ended in a step that then failed
        self._numbers = itertools.count()
        self._seeds = torch.Generator().manual_seed(seed)
        self._gauge()

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        standing: Standing | None = None,
        adapter: str | None = None,
    ) -> str:
        """Queue a request and return its id. adapter: name of a loaded one, with which its tokens are computed.

        Raises RequestError, naming the field, for an empty prompt, one that does not fit the context with its
        `max_tokens`, a token id that is none, a seed or bias out of range, an adapter that is not loaded, or an id
        already in use.
        """
        request_id = request_id or uuid.uuid4().hex
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use", field="request_id")
        text = prompt if isinstance(prompt, str) else None
        ids, source = self.encode(prompt), None
        standing, loaded = standing or Standing(), self.adapters.find(adapter)
        if ids and self.pair is not None and self.sources is not None:
            source = encoder_decoder.new_source(ids, params, standing.cache_salt, self.pair, self.sources)
            ids = [self.pair.decoder_start_token_id]
        self.admission.check(ids, params)
        seed = params.seed
        if seed is None:
            seed = int(torch.randint(1 << 62, (1,), generator=self._seeds))
        # every prompt token's own log-probability needs its state, which a cached block does not hold
        salts = filter(None, [standing.cache_salt, None if loaded is None else loaded.salt])
        length = len(source.ids if source else ids)
        flops = self.admission.flops(length)
        request = Request(
            request_id,
            text,
            ids,
            params,
            tokenizer=self.tokenizer,
            max_model_len=self.max_model_len,
            seed=seed,
            numbers=self._numbers,
            clock=self.clock,
            standing=standing,
            flops=flops if loaded is None else loaded.flops(flops, length),
            cache_root=None if params.prompt_logprobs is not None else salt(*salts),
            source=source,
            adapter=loaded,
        )
        self._requests[request_id] = request
        for completion in request.completions:
            self.scheduler.add(completion)
        return request_id

    def load_adapter(self, name: str, adapter: Lora) -> None:
        """Let requests name an adapter. Under a name that is taken it replaces the one there for requests to come;
        those that have that one go on with it. Nothing is cached of it yet.

        Drafts are made without adapters and verified with them, so speculation changes no token.

        Raises RequestError (`adapter`) for an empty name, one that was read for another configuration, and where
        the runner has no place for adapters.
        """
        self.adapters.load(name, adapter)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises RequestError (`adapter`) when it is not loaded, or while requests use it."""
        users = [r for r in self._requests.values() if r.adapter is not None and r.adapter.name == name]
        self.adapters.unload(name, len(users))

    def speculate(self, proposer: Proposer) -> None:
        """From now on let `proposer` draft tokens, as many as pay; an AdaptiveProposer is taken as it is."""
        self.proposer = proposer if isinstance(proposer, AdaptiveProposer) else AdaptiveProposer(proposer)

    def has_unfinished(self) -> bool:
        """True while any request is queued or running."""
        return bool(self._requests)

    def abort(self, request_id: str) -> None:
        """Drop a request and free its memory now. An unknown or finished id is ignored."""
        request = self._requests.pop(request_id, None)
        for completion in request.completions if request else ():
            if completion.finish_reason is None:
                self._leave(completion)
        self._gauge()

    def export(self, request_id: str) -> Handover:
        """Take a request that has its first token out of this engine, with its keys and values, for another's `adopt`.

        Raises RequestError for an unknown or finished request, one of several completions, one without a token yet, or
        one with an adapter, which the other engine may not have.
        """
        request = self._requests.get(request_id)
        if request is not None and request.adapter is not None:
            raise RequestError(
                f"request {request_id!r} has the adapter {request.adapter.name!r}, and is not handed over",
                field="adapter",
            )
        if request is None or self.pair is not None:
            why = "is not here" if request is None else "reads an encoder, whose states do not travel"
            raise RequestError(f"request {request_id!r} {why}", field="request_id")
        completion = request.completions[0]
        blocks = Blocks.of(self.runner, self.pool, completion.block_table, completion.num_computed_tokens)
        handover = export_completion(completion, self.clock(), blocks)
        self.abort(request_id)
        return handover

    def can_adopt(self, handover: Handover) -> bool:
        """Whether a seat and blocks are free for a request of another engine."""
        return self.scheduler.has_room(handover.blocks.num_blocks)

    def adopt(self, handover: Handover) -> str:
        """Go on with a request of another engine of the same model and options, as that would have; returns its id.

        Raises RequestError as `add` does, when the blocks are not of such an engine, and when there is no room.
        """
        handover.blocks.check(self.runner, self.pool)
        if self.pair is not None or not self.can_adopt(handover):
            raise RequestError("no seat or blocks are free: ask can_adopt, and step until there are", field="blocks")
        params, standing = handover.params_here(), handover.standing_here(self.clock())
        request_id = self.add(handover.prompt_ids, params, request_id=handover.request_id, standing=standing)
        completion = self._requests[request_id].completions[0]
        restore_completion(completion, handover)
        if completion.finish_reason is not None:
            self.scheduler.remove(self._requests.pop(request_id).completions[0])
            raise RequestError(f"the context of {self.max_model_len} leaves no room", field="max_model_len")
        self.scheduler.adopt(completion, handover.blocks.num_blocks)
        self.runner.write_blocks(completion.block_table, handover.blocks.data)
        self.scheduler.computed(completion, handover.blocks.num_tokens)
        return request_id

    @torch.inference_mode()
    def step(self, *, finished_only: bool = False) -> list[RequestOutput]:
        """Compute one batch. Returns the requests that advanced, each with all its output so far; with
        `finished_only` only those that are done.

        Whatever it raises (out of memory, a processor or proposer that fails), the next step goes on from the tokens
        that stand then.
        """
        try:
            return self._step(finished_only)
        except BaseException:
            self._requeue()
            raise

    def _step(self, finished_only: bool) -> list[RequestOutput]:
        started = time.perf_counter()
        scheduled = self._schedule()
        if not scheduled:
            return self._collect([], finished_only)
        planned = time.perf_counter()
        hidden = self._forward(scheduled)
        computed = time.perf_counter()
        ready = self._ready(scheduled, hidden)
        drafted = sum(len(completion.draft.token_ids) for completion, _ in ready if completion.draft is not None)
        head = 0.0
        if ready:
            self._choose(ready, hidden)
            head = self.chooser.model_seconds
        outputs = self._collect([completion for completion, _ in ready], finished_only)
        chosen = time.perf_counter()
        self._measure(scheduled, drafted, planned - started, computed - planned + head, chosen - computed - head)
        return outputs

    def _requeue(self) -> None:
        """After a failure nothing is known of what the step computed: whatever runs is computed again."""
        for sequence in list(self.scheduler.running):
            completion = cast(Completion, sequence)
            completion.draft = None
            if completion.finish_reason is None:
                self.scheduler.requeue(completion)
            else:
                self._leave(completion)
                self._late.append(completion)

    def encode(self, prompt: Prompt) -> list[int]:
        """See `Admission.encode`."""
        return self.admission.encode(prompt)

    def token_ids(self, field: str, tokens: Iterable[object]) -> list[int]:
        """See `Admission.token_ids`."""
        return self.admission.token_ids(field, tokens)

    @property
    def max_prompt_len(self) -> int:
        """See `Admission.max_prompt_len`."""
        return self.admission.max_prompt_len

    def check_integrity(self) -> None:
        """Every block is free, cached, or held by the completions that count on it. Raises AssertionError otherwise."""
        held = [completion for request in self._requests.values() for completion in request.completions]
        self.pool.check_integrity([completion.block_table for completion in held])
        if self.sources is not None:
            self.sources.pool.check_integrity([c.source.block_table for c in held if c.source is not None])

    def _schedule(self) -> list[Scheduled]:
        """Decide on a step, and have its drafts made."""
        deciding = 0
        for sequence in self.scheduler.running:
            completion = cast(Completion, sequence)
            completion.num_lookahead = 0
            if sequence.num_missing_tokens == 1:
                deciding += 1
                if self.proposer is not None:
                    # the last token of all is never drafted: it would have nothing to verify
                    room = completion.max_tokens - len(completion.output_ids) - 1
                    completion.num_lookahead = min(self.proposer.max_tokens, room)
        now = self.clock()
        scheduled = self.scheduler.schedule(now, self.pacing.limit(deciding))
        if self.scheduler.copies:
            self.runner.copy_blocks(self.scheduler.copies)
        for sequence, _ in scheduled:
            completion = cast(Completion, sequence)
            if completion.slot is None:
                self.metrics.prompt_tokens += sequence.num_prompt_tokens
                self.metrics.cached_prompt_tokens += sequence.num_cached_tokens
                self.metrics.queue_seconds.add(now - sequence.arrived_at)
                self.chooser.enter(completion)
        if self.proposer is not None:
            self._propose([cast(Completion, sequence) for sequence, _ in scheduled if sequence.num_lookahead > 0])
        return scheduled

    def _propose(self, completions: list[Completion]) -> None:
        assert self.proposer is not None
        if not completions:
            return
        drafts = self.proposer.propose([completion.draft_request() for completion in completions])
        for completion, draft in zip(completions, drafts, strict=True):
            assert len(draft.token_ids) <= completion.num_lookahead, "a draft longer than its blocks"
            completion.draft = draft if draft.token_ids else None

    def _forward(self, scheduled: list[Scheduled]) -> Tensor:
        """Final hidden states (tokens, hidden) of all scheduled tokens, each sequence's draft after its own."""
        ids: list[int] = []
        chunks: list[Chunk] = []
        for sequence, count in scheduled:
            start = sequence.num_computed_tokens
            ids += sequence.token_ids[start : start + count]
            draft = cast(Completion, sequence).draft
            drafted = draft.token_ids if draft is not None else ()
            ids += drafted
            adapter = cast(Completion, sequence).request.adapter_form
            chunks.append(Chunk(sequence.block_table, start, count + len(drafted), sequence.source, adapter))
        return self.runner.hidden_states(ids, chunks)

    def _ready(self, scheduled: list[Scheduled], hidden: Tensor) -> list[tuple[Completion, int]]:
        """The completions whose next token can be chosen, each with the row of its last token. The others are recorded
        as computed so far."""
        ready: list[tuple[Completion, int]] = []
        row = 0
        for sequence, count in scheduled:
            completion = cast(Completion, sequence)
            if completion.request.params.prompt_logprobs is not None and completion.index == 0:
                self._record_prompt(completion, hidden[row : row + count])
            known = row + count - 1  # where its last known token is; drafted ones follow
            last = known + (len(completion.draft.token_ids) if completion.draft else 0)
            row = last + 1
            finished = count == sequence.num_missing_tokens
            self.scheduler.computed(sequence, sequence.num_computed_tokens + count)
            if not finished:
                continue
            ready.append((completion, last))
            if completion.index == 0 and not completion.output_ids:
                others = completion.request.completions[1:]
                ready += [(other, known) for other in others if self._fork(completion, other)]
        return ready

    def _fork(self, completion: Completion, other: Completion) -> bool:
        """Let another completion of a prompt choose its first token from the same state."""
        if other.slot is not None or not self.scheduler.fork(completion, other):
            return False
        self.chooser.enter(other)
        return True

    def _choose(self, ready: list[tuple[Completion, int]], hidden: Tensor) -> None:
        standing = sum(len(completion.output_ids) for completion, _ in ready)
        accepted = self.chooser.choose(ready, hidden)
        self.metrics.generated_tokens += sum(len(completion.output_ids) for completion, _ in ready) - standing
        for (completion, _), count in zip(ready, accepted, strict=True):
            draft, completion.draft = completion.draft, None
            if draft is not None:
                self.metrics.drafted_tokens += len(draft.token_ids)
                self.metrics.accepted_tokens += count
                if self.proposer is not None and completion.slot is not None:
                    self.proposer.record(completion.slot, len(draft.token_ids), count)
                if count:  # the keys and values of accepted tokens stay, those of the others are written again
                    known = len(completion.token_ids) - 1
                    self.scheduler.computed(completion, min(completion.num_computed_tokens + count, known))
            if completion.finish_reason is not None:
                self._leave(completion)

    def _leave(self, completion: Completion) -> None:
        if completion.index == 0:
            for other in completion.request.completions:  # nobody waits for what will not come
                other.leader = None
        self.scheduler.remove(completion)
        if self.proposer is not None and completion.slot is not None:
            self.proposer.forget(completion.slot)
        self.chooser.leave(completion)

    def _record_prompt(self, completion: Completion, hidden: Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow the computed ones."""
        request, start = completion.request, completion.num_computed_tokens
        following = request.prompt_ids[start + 1 : start + 1 + len(hidden)]
        # computed again after a preemption: what was recorded stays
        skip = max(0, len(request.prompt_logprobs) - 1 - start)
        if following[skip:]:
            count = request.params.prompt_logprobs or 0
            request.prompt_logprobs += prompt_logprobs(
                hidden[skip : len(following)], self.runner.logits, following[skip:], count, self.tokenizer
            )

    def _collect(self, advanced: list[Completion], finished_only: bool) -> list[RequestOutput]:
        late, self._late = self._late, []
        present = self._requests.values() if late else ()  # one of them may have been aborted since
        requests = dict.fromkeys(
            [*(c.request for c in late if c.request in present), *(completion.request for completion in advanced)]
        )
        for request in requests:
            if request.finished:
                del self._requests[request.request_id]
                self.metrics.finished_requests += 1
        return [request.output() for request in requests if request.finished or not finished_only]

    def _measure(
        self,
        scheduled: list[Scheduled],
        drafted: int,
        schedule: float,
        forward: float,
        sample: float,
    ) -> None:
        """Count a step; the times are seconds."""
        metrics = self.metrics
        prompt = sum(count for _, count in scheduled if count > 1) + self.scheduler.source_tokens
        self.pacing.measured(forward, sum(count == 1 for _, count in scheduled), prompt)
        if self.proposer is not None and not prompt:
            self.proposer.cost.observe(schedule + forward + sample, len(scheduled), drafted)
        metrics.steps += 1
        metrics.scheduled_tokens += sum(count for _, count in scheduled)
        metrics.preempted = self.scheduler.num_preempted
        metrics.schedule_seconds.add(schedule)
        metrics.forward_seconds.add(forward)
        metrics.sample_seconds.add(sample)
        self._gauge()

    def _gauge(self) -> None:
        """Count what is there now."""
        metrics, pool = self.metrics, self.pool
        metrics.running, metrics.waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        metrics.blocks_free, metrics.blocks_cached = pool.num_free - pool.num_cached, pool.num_cached
        metrics.blocks_used = pool.num_blocks - pool.num_free


def _need_at_least_one(**options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < 1:
            raise RequestError(f"{name} must be at least 1, got {value}", field=name)
