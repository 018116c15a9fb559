"""What POSIX sees: names, contents, attributes, quotas, codes of directories."""
