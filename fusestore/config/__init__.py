"""`fusestore.toml` and the identity of a node; making a store."""
