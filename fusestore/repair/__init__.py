"""The repair path: healing, rebuilding a node, scrubbing, and what is at risk."""
