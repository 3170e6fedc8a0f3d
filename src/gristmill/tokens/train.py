"""Train a byte-level BPE tokenizer: merge the most frequent pair of symbols until the vocabulary is full.

Text is split into words by GPT-2's rule and into single digits, so that numbers are spelled alike whatever their
length; the symbols start as the 256 bytes, so any text can be encoded. The split is the one of SmolLM, which GGUF
readers know by the name "smollm".

Source: Sennrich, Haddow and Birch 2016 (BPE); Radford et al. 2019 (byte level).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from gristmill.errors import DataError
from gristmill.tokens.templates import CHATML, IM_END, IM_START
from gristmill.tokens.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
CHATML_SPECIALS = (END_OF_TEXT, IM_START, IM_END)


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = CHATML_SPECIALS,
    progress: Callable[[int], None] | None = None,
) -> Tokenizer:
    """A tokenizer of at most `vocab_size` ids; fewer when the corpus has no more pairs to merge.

    The first special token ends a text: it is start, end and padding token and a stop token. With ChatML's two the
    tokenizer carries the ChatML template, and `<|im_end|>` is a stop token too. `progress` is called with 1 for each
    text read. The same texts give the same tokenizer. Raises DataError for an empty corpus or a `vocab_size` with
    no room for 256 bytes and the special tokens.
    """
    specials = list(dict.fromkeys(special_tokens))
    if not specials or not all(specials):
        raise DataError("special_tokens must hold at least the token that ends a text, and no empty one")
    least = 256 + len(specials)
    if vocab_size < least:
        raise DataError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(specials)} special tokens: {least}")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    read = _Counted(texts, progress)
    backend.train_from_iterator(read, trainer)
    if read.characters == 0:
        raise DataError("the corpus is empty: there is no text to train a tokenizer on")
    return _with_roles(backend, specials)


def compression(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """UTF-8 bytes per token over all texts; more is shorter. Raises DataError when there is no text."""
    size = tokens = 0
    for text in texts:
        size += len(text.encode("utf-8"))
        tokens += len(tokenizer.encode(text, add_bos=False))
    if tokens == 0:
        raise DataError("compression of no text is undefined; give at least one that is not empty")
    return size / tokens


def _with_roles(backend: Backend, specials: Sequence[str]) -> Tokenizer:
    ids = {token: backend.token_to_id(token) for token in specials}
    end = ids[specials[0]]
    chat = IM_START in ids and IM_END in ids
    stops = (end, ids[IM_END]) if chat else (end,)
    return Tokenizer(
        backend=backend,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        stop_token_ids=tuple(index for index in dict.fromkeys(stops) if index is not None),
        chat_template=CHATML if chat else None,
    )


class _Counted:
    """The texts, counted while the trainer draws them."""

    def __init__(self, texts: Iterable[str], progress: Callable[[int], None] | None) -> None:
        self._texts = texts
        self._progress = progress
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.characters += len(text)
            yield text
            if self._progress is not None:
                self._progress(1)
