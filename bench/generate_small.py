"""Greedy decoding of SmolLM2-135M in float32, one request: ours against `transformers.generate`, same weights.

python bench/generate_small.py [rounds]
"""

import sys

import torch
from common import finish, paired_seconds, rates
from transformers import AutoModelForCausalLM

from gristmill import LLM, SamplingParams, assets

NEW_TOKENS = 64
PROMPT = "The history of the water mill begins in antiquity, when engineers found that a stream could"


def main(rounds: int) -> None:
    """Measure and print; the two sides must give the same tokens."""
    gguf = assets.get("smollm2-135m")
    llm = LLM(gguf)
    plain = LLM(gguf, fast_kernels=False)
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    ids = llm.tokenizer.encode(PROMPT)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    inputs = torch.tensor([ids])

    def transformers_generate() -> list[int]:
        with torch.inference_mode():
            out = theirs.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        return out[0, len(ids) :].tolist()

    ours = llm.generate([ids], params)[0].outputs[0].token_ids
    same = ours == transformers_generate()
    seconds = paired_seconds(
        {
            "gristmill": lambda: llm.generate([ids], params),
            "gristmill, fast kernels off": lambda: plain.generate([ids], params),
            "transformers": transformers_generate,
        },
        rounds=rounds,
    )
    speed = rates(seconds, NEW_TOKENS)
    result = {"ratio": round(speed["gristmill"] / speed["transformers"], 3), "same_tokens": same}
    threads = torch.get_num_threads()
    finish({"bench": "generate_small", "unit": "new tokens/s", "threads": threads, **speed, **result})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
