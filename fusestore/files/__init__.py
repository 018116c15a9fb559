"""The file system as POSIX defines it: names, contents, attributes, quotas, codes."""
