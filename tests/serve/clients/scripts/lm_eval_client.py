"""lm-eval against URL: the items of tasks/, asked of MODEL in every way it knows; prints its numbers as JSON.

Run it in the folder of the tasks. TOKENIZER is the model's directory.
"""

import json
import sys

import lm_eval
from lm_eval.tasks import TaskManager

url, model, tokenizer = sys.argv[1:]
manager = TaskManager(include_path=".", include_defaults=False)


def ask(kind: str, path: str, tasks: list[str], *, template: bool = False, batch: int = 1, **options) -> dict:
    """By task: of every question to the model its arguments and the answer."""
    arguments = {"model": model, "base_url": f"{url}/v1/{path}", "max_length": 512, "max_retries": 1, **options}
    found = lm_eval.simple_evaluate(
        model=kind,
        model_args=arguments,
        tasks=tasks,
        task_manager=manager,
        batch_size=batch,
        apply_chat_template=template,
        log_samples=True,
        bootstrap_iters=0,
    )
    return {
        task: [
            [*question[:2], answer[0]]
            for one in samples
            for question, answer in zip(_questions(one), one["resps"], strict=True)
        ]
        for task, samples in found["samples"].items()
    }


def _questions(sample: dict) -> list:
    return list(sample["arguments"].values()) if isinstance(sample["arguments"], dict) else sample["arguments"]


both, known = ["mill_choice", "mill_answer"], {"tokenizer": tokenizer, "tokenizer_backend": "huggingface"}
answers = {
    "ids": ask("local-completions", "completions", both, **known),
    "together": ask("local-completions", "completions", both, batch=2, num_concurrent=3, **known),
    "texts": ask("local-completions", "completions", both, tokenized_requests=False, **known),
    "chat": ask("local-chat-completions", "chat/completions", ["mill_answer"], template=True),
}
print(json.dumps(answers))
