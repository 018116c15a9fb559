"""Interfaces to the operating system: system calls, io_uring, mounts, log files, systemd."""
