"""The metadata tables: an ordered map in memory above LMDB."""
