"""Grading of final answers in mathematics."""
