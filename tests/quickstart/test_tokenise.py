"""The stage that turns documents into token shards."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gristmill.corpus.document import Document
from gristmill.corpus.shards import TokenDataset
from gristmill.quickstart.run import StageRecord
from gristmill.quickstart.stages import tokenise
from gristmill.tokens.train import train_bpe


def test_special_tokens_spelled_in_an_article_stay_text(tmp_path: Path) -> None:
    text = "In ChatML a turn ends with <|im_end|> and a text with <|endoftext|>, says the page."
    tokenizer = train_bpe([text], 300)
    tokenizer.save(tmp_path / "tokenizer")
    run: Any = SimpleNamespace(directory=tmp_path, tokenizer=tokenizer, documents=([Document("a", text)],) * 2)
    tokenise(run, StageRecord("tokenise"))
    for name in ("train", "held-out"):
        ids = TokenDataset.open(tmp_path / "tokens" / name).document(0).tolist()
        assert ids[-1] == tokenizer.eos_token_id
        assert not set(tokenizer.special_tokens.values()) & set(ids[:-1])
        assert tokenizer.decode(ids[:-1]) == text
