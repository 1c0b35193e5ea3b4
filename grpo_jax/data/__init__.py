"""Data sets: reading, layouts, chat templates, tokenization, packing, and the order of batches."""
