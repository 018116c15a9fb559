"""The daemon: FUSE requests, the control socket, mounting, systemd units."""
