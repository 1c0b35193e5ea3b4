"""What runs inside sandboxes, as source text: nothing here is imported by the package, and it needs Python 3.8 alone."""
