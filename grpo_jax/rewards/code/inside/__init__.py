"""What runs inside sandboxes, as source text: the package imports nothing of it, and it needs Python 3.8 alone."""
