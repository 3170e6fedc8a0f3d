"""The peers of bench/train.py: transformers' Trainer, a plain transformers loop, and a compiled small GPT."""

import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

LEARNING_RATE, DECAY, CLIP = 1e-3, 0.1, 1.0


def plain_loop(model: Any, rows: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """A step of the loop that everybody writes around a transformers model."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=DECAY, fused=True)

    def step() -> None:
        with torch.autocast(rows.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


class TrainerSteps:
    """transformers' Trainer, one step at a call: it runs in a thread that waits at the end of every step."""

    def __init__(self, model: Any, rows: Tensor, dtype: torch.dtype) -> None:
        self._go, self._done, self._error = threading.Semaphore(0), threading.Semaphore(0), None
        self._over = False
        self._directory = tempfile.TemporaryDirectory()
        arguments = TrainingArguments(
            output_dir=self._directory.name,
            max_steps=1_000_000,
            per_device_train_batch_size=len(rows),
            learning_rate=LEARNING_RATE,
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            bf16=dtype == torch.bfloat16,
            optim="adamw_torch_fused",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=rows.device.type == "cpu",
        )

        class Turn(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(turn, args: Any, state: Any, control: Any, **_: Any) -> None:
                self._go.acquire()
                control.should_training_stop = self._over

            def on_step_end(turn, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = self._over
                self._done.release()

        class Rows(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
            def __iter__(self) -> Iterator[dict[str, Tensor]]:
                while True:
                    for row in rows.cpu():
                        yield {"input_ids": row, "labels": row}

        trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[Turn()])
        self._thread = threading.Thread(target=trainer.train, daemon=True)
        self._thread.start()

    def __call__(self) -> None:
        self._go.release()
        while not self._done.acquire(timeout=5):
            if not self._thread.is_alive():
                raise RuntimeError("the Trainer's thread has died")

    def close(self) -> None:
        """End the thread."""
        self._over = True
        self._go.release()
        self._thread.join(timeout=60)
        self._directory.cleanup()


class SmallGPT(nn.Module):
    """Learned positions, pre-norm blocks without biases, tanh GELU: as many weights as the model it stands beside."""

    def __init__(self, vocabulary: int, size: int, layers: int, heads: int, wide: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.tokens, self.positions = nn.Embedding(vocabulary, size), nn.Embedding(context, size)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(size, bias=False),
                    "qkv": nn.Linear(size, 3 * size, bias=False),
                    "out": nn.Linear(size, size, bias=False),
                    "norm2": nn.LayerNorm(size, bias=False),
                    "up": nn.Linear(size, wide, bias=False),
                    "down": nn.Linear(wide, size, bias=False),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, rows: Tensor) -> Tensor:
        """Mean loss of predicting each token of rows (rows, tokens) from those before it."""
        x = self.tokens(rows) + self.positions(torch.arange(rows.shape[1], device=rows.device))
        for block in self.blocks:
            q, k, v = (
                part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in block["qkv"](block["norm1"](x)).chunk(3, dim=-1)  # type: ignore[index]
            )
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + block["out"](attended)  # type: ignore[index]
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x)), approximate="tanh"))  # type: ignore[index]
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())


def compiled_loop(model: SmallGPT, rows: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """A step of a loop whose whole forward is compiled."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=DECAY, fused=True)
    compiled = torch.compile(model)

    def step() -> None:
        with torch.autocast(rows.device.type, dtype, enabled=dtype != torch.float32):
            loss = compiled(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step
