"""Scripts that run inside sandboxes. They are sent as source text, never imported, and need only Python 3.8."""
