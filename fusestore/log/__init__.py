"""What changes, and where it is written: transactions and journals."""
