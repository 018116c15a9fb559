"""Counters, metrics, and the status page."""
