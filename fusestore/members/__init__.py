"""The nodes of an open store: who keeps data, and the state of each."""
