"""The nodes of an open store, and the state of each."""
