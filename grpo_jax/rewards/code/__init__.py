"""Grading of programs by their tests, in a sandbox."""
