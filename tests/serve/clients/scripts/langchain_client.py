"""langchain-openai against URL: prints what MODEL answered and how long the vectors of EMBEDDER are, as JSON."""

import json
import sys

from common import City
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

url, model, embedder, tokenizer = sys.argv[1:]
there = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60}


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


chat = ChatOpenAI(model=model, stream_usage=True, **there)
whole = chat.invoke("Hi")
chunks = list(ChatOpenAI(model=model, stream_usage=True, max_tokens=40, temperature=0, seed=1, **there).stream("Hi"))
question = HumanMessage("What is 2 + 3?")
called = chat.bind_tools([add]).invoke([question])
results = [ToolMessage(str(add.invoke(call["args"])), tool_call_id=call["id"]) for call in called.tool_calls]
streamed_call = None
for chunk in chat.bind_tools([add]).stream([question]):
    streamed_call = chunk if streamed_call is None else streamed_call + chunk
vectors = [
    OpenAIEmbeddings(model=embedder, check_embedding_ctx_length=False, **there),
    # sends token ids, cut by the model's own tokenizer
    OpenAIEmbeddings(model=tokenizer, tiktoken_enabled=False, **there),
]
answers = {
    "whole": whole.content,
    "finish_reason": whole.response_metadata["finish_reason"],
    "tokens": whole.usage_metadata["output_tokens"],
    "streamed": "".join(chunk.content for chunk in chunks),
    "streamed_tokens": sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata),
    "call": called.tool_calls[0]["args"],
    "streamed_call": streamed_call.tool_calls[0]["args"],
    "after_call": chat.bind_tools([add]).invoke([question, called, *results]).content,
    "parsed": [
        chat.with_structured_output(City, method=method).invoke("JSON, please").model_dump()
        for method in ("json_schema", "function_calling", "json_mode")
    ],
    "text": OpenAI(model=model, max_tokens=5, **there).invoke("Hi"),
    "dimensions": [len(vector) for each in vectors for vector in each.embed_documents(["a", "b"])],
    "vectors_differ": max(
        abs(x - y) for x, y in zip(vectors[0].embed_query("ab"), vectors[1].embed_query("ab"), strict=True)
    ),
}
print(json.dumps(answers))
