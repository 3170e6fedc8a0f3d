"""litellm against URL: prints what MODEL answered and how long the vectors of EMBEDDER are, as JSON."""

import asyncio
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the internet for prices

import litellm
from common import ADD, MESSAGES, SUM, City

url, model, embedder = sys.argv[1:]
there = {"api_base": f"{url}/v1", "api_key": "none", "num_retries": 0, "timeout": 60}
chat = {**there, "model": f"openai/{model}"}

whole = litellm.completion(messages=MESSAGES, max_tokens=40, seed=1, **chat)
chunks = list(litellm.completion(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **chat))
later = asyncio.run(litellm.acompletion(messages=MESSAGES, top_k=5, extra_body={"min_p": 0.1}, **chat))
called = litellm.completion(messages=SUM, tools=[ADD], tool_choice="auto", **chat).choices[0].message
result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "5"}
looped = litellm.completion(messages=[*SUM, called, result], tools=[ADD], **chat)
parsed = litellm.completion(messages=[{"role": "user", "content": "JSON, please"}], response_format=City, **chat)
text = litellm.text_completion(prompt="Hi", max_tokens=5, model=f"text-completion-openai/{model}", **there)
vectors = litellm.embedding(input=["a", "b"], model=f"openai/{embedder}", encoding_format="float", **there)
ranked = litellm.rerank(model=f"hosted_vllm/{embedder}", query="a", documents=["a", "b"], api_base=url, api_key="none")
try:
    litellm.completion(messages=MESSAGES, temperature=9, **chat)
    error = None
except litellm.BadRequestError as failure:
    error = str(failure)
answers = {
    "whole": whole.choices[0].message.content,
    "finish_reason": whole.choices[0].finish_reason,
    "tokens": whole.usage.completion_tokens,
    "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
    "streamed_tokens": chunks[-1].usage.completion_tokens,
    "async": later.choices[0].message.content,
    "call": json.loads(called.tool_calls[0].function.arguments),
    "after_call": looped.choices[0].message.content,
    "parsed": json.loads(parsed.choices[0].message.content),
    "text": text.choices[0].text,
    "dimensions": [len(entry["embedding"]) for entry in vectors.data],
    "ranked": [entry["index"] for entry in ranked.results],
    "error": error,
}
print(json.dumps(answers))
