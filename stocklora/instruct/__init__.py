"""Instruction tuning: from a news database or a file of conversations to a chat model, and its honest score."""
