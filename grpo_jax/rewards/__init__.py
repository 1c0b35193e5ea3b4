"""Rewards: functions from prompts and completions to scores, and what composes them."""
