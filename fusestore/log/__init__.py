"""The log of changes: transactions and journals."""
