"""The write path: file bytes become stripes, stripes become shards on the nodes."""
