"""Changes, and the journals that hold them: transactions and journals."""
