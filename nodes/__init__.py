"""Where shards and journals are kept; installed as `fusestore.nodes`."""
