"""llama-index against URL: prints what MODEL answered and how long the vectors of EMBEDDER are, as JSON."""

import json
import sys

from common import City
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

url, model, embedder = sys.argv[1:]
there = {"api_base": f"{url}/v1", "api_key": "none", "max_retries": 0}
kinds = {"model": model, "context_window": 4096, "is_chat_model": True, "timeout": 60, **there}


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


chat = OpenAILike(**kinds)
caller = OpenAILike(is_function_calling_model=True, **kinds)
former = OpenAILike(should_use_structured_outputs=True, **kinds)
text = OpenAILike(model=model, context_window=4096, is_chat_model=False, max_tokens=5, timeout=60, **there)
whole = chat.chat([ChatMessage(role="user", content="Hi")])
vectors = OpenAILikeEmbedding(model_name=embedder, **there).get_text_embedding_batch(["a", "b"])
answers = {
    "whole": whole.message.content,
    "finish_reason": whole.raw.choices[0].finish_reason,
    "tokens": whole.raw.usage.completion_tokens,
    "streamed": "".join(part.delta for part in chat.stream_chat([ChatMessage(role="user", content="Hi")])),
    "call_result": caller.predict_and_call([FunctionTool.from_defaults(add)], user_msg="What is 2 + 3?").response,
    "parsed": [each.structured_predict(City, PromptTemplate("JSON, please")).model_dump() for each in (caller, former)],
    "text": text.complete("Hi").text,
    "streamed_text": "".join(part.delta for part in text.stream_complete("Hi")),
    "dimensions": [len(vector) for vector in vectors],
}
print(json.dumps(answers))
