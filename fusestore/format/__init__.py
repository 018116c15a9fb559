"""The format of every stored byte: records, rows, codes, placement of shards. No I/O."""
