"""The write path: file bytes become stripes, and stripes become shards on nodes."""
