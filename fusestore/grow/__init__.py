"""Nodes are added, drained and removed; shards move to even the load."""
