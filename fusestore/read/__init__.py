"""The read path: verified bytes from the nodes, decoded where shards are missing."""
