"""Data: tasks, corpora, tokenisation, packing, batches."""
