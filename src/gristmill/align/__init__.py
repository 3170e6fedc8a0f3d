"""Instruction data and supervised fine-tuning."""
