"""Every byte that is stored: records, rows, codes, where shards go. No I/O."""
