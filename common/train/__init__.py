"""The Trainer and what steps it."""
