"""One side of bench/engine.py, in a process of its own and under the Python that has its library.

    python bench/engine_sides.py LIBRARY:KIND WEIGHTS CONTEXT

loads the model once and says "ready". Then each line of standard input is a run, {"prompts": [[ids, ...], ...],
"new": n}: all prompts at once, exactly n tokens after each, greedily and whatever end tokens come. The answer is a line
of its seconds and of the tokens. Nothing of gristmill is imported but by its own side.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts and the number of tokens to generate; returns these."""
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
SEATS = 32
"""Most requests at once."""


def gristmill(kind: str, path: Path, context: int) -> Run:
    """Our engine. Its kinds are types of weights and quantisations."""
    from gristmill import LLM, SamplingParams

    floating = kind in ("float32", "bfloat16")
    options: dict[str, Any] = {"dtype": kind} if floating else {"quantization": kind}
    llm = LLM(path, **options, max_num_seqs=SEATS, max_model_len=context, kv_cache_tokens=SEATS * context)
    print(llm.path, file=sys.stderr)

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        return [list(done.outputs[0].token_ids) for done in llm.generate(prompts, params)]

    return run


def transformers(kind: str, path: Path, context: int) -> Run:
    """`generate` of a batch of equally long prompts."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, kind)).eval()
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        done = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        return done[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]

    return run


def llama(kind: str, path: Path, context: int) -> Run:
    """llama.cpp's own batches: whole prompts first, then one token of every sequence in each decode."""
    import llama_cpp as lib
    import numpy as np

    lib.llama_backend_init()
    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, None)
    options = lib.llama_model_default_params()
    model = lib.llama_model_load_from_file(str(path).encode(), options)
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    contexts: dict[int, Any] = {}

    def make(rows: int) -> Any:
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.n_batch, settings.n_ubatch = rows * context, rows, 2048, 512
        settings.n_threads = settings.n_threads_batch = THREADS
        return lib.llama_init_from_model(model, settings), lib.llama_batch_init(2048, 0, 1)

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        if len(prompts) not in contexts:
            contexts[len(prompts)] = make(len(prompts))
        state, batch = contexts[len(prompts)]
        lib.llama_memory_clear(lib.llama_get_memory(state), True)

        def decode(tokens: list[tuple[int, int, int]], last: set[int]) -> dict[int, int]:
            """The most probable next tokens by row; tokens are (id, position, row), `last` the places that decide."""
            batch.n_tokens = len(tokens)
            for place, (token, position, row) in enumerate(tokens):
                batch.token[place], batch.pos[place] = token, position
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
                batch.logits[place] = place in last
            if lib.llama_decode(state, batch):
                raise RuntimeError("llama_decode failed")
            if not last:
                return {}
            scores = np.ctypeslib.as_array(lib.llama_get_logits(state), shape=(len(last), vocabulary))
            best = scores.argmax(axis=1).tolist()
            return {tokens[place][2]: best[number] for number, place in enumerate(sorted(last))}

        waiting = [(token, at, row) for row, ids in enumerate(prompts) for at, token in enumerate(ids)]
        ends = {(row, len(ids) - 1) for row, ids in enumerate(prompts)}
        known: dict[int, int] = {}
        for start in range(0, len(waiting), 2048):
            part = waiting[start : start + 2048]
            known |= decode(part, {place for place, (_, at, row) in enumerate(part) if (row, at) in ends})
        out = [[known[row]] for row in range(len(prompts))]
        for step in range(new - 1):
            known = decode(
                [(ids[-1], len(prompts[row]) + step, row) for row, ids in enumerate(out)], set(range(len(out)))
            )
            for row, ids in enumerate(out):
                ids.append(known[row])
        return out

    run.kept = silent  # type: ignore[attr-defined]  # the library calls it as long as it lives
    return run


def vllm(kind: str, path: Path, context: int) -> Run:
    """vLLM for CPUs, compiled as it comes, in this process."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, range(THREADS))),
    }
    from vllm import LLM, SamplingParams

    llm = LLM(str(path), dtype=kind, max_model_len=context, max_num_seqs=SEATS, enable_prefix_caching=False, seed=0)

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        done = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in done]

    return run


def openvino(kind: str, path: Path, context: int) -> Run:
    """OpenVINO GenAI's pipeline with its continuous batching."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.enable_prefix_caching, scheduler.cache_size = SEATS, False, 2
    scheduler.max_num_batched_tokens = 2048
    pipeline = genai.LLMPipeline(
        str(path), "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=THREADS, PERFORMANCE_HINT="LATENCY"
    )

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = np.array(prompts, dtype=np.int64)
        config = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        done = pipeline.generate(genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids))), config)
        return [list(tokens) for tokens in done.tokens]

    return run


def ctranslate2(kind: str, path: Path, context: int) -> Run:
    """CTranslate2's batched greedy search; it speaks in tokens' texts."""
    import ctranslate2 as lib

    generator = lib.Generator(str(path), device="cpu", compute_type=kind, inter_threads=1, intra_threads=THREADS)
    texts = json.loads((path / "vocabulary.json").read_text())

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        done = generator.generate_batch(
            [[texts[token] for token in ids] for ids in prompts],
            max_length=new,
            min_length=new,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [list(result.sequences_ids[0]) for result in done]

    return run


LIBRARIES = (gristmill, transformers, llama, vllm, openvino, ctranslate2)


def main(side: str, path: str, context: str) -> None:
    """Load, then answer runs."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not stand between the answers
    library, kind = side.split(":")
    make = next(entry for entry in LIBRARIES if entry.__name__ == library)
    run = make(kind, Path(path), int(context))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        tokens = run(asked["prompts"], asked["new"])
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder has names of libraries
    main(*sys.argv[1:])
