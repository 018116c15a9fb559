"""Durability: commits, checkpoints, replay after a crash, freeing room."""
