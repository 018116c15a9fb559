"""What the operating system gives: system calls, io_uring, mount tables, log files, systemd."""
