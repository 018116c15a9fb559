"""`fusestore.toml`, the identity of nodes, mount options, and making a store."""
