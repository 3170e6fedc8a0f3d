"""Tokenizer training and the chat renderer."""
