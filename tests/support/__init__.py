"""What test modules share: stores, faults, power cuts, and looks at files."""
