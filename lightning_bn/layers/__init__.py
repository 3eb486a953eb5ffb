"""Batch-norm layers whose running statistics are an average of the user's choice, and what turns a model's layers into
them."""
