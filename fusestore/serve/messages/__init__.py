"""Requests and results of the commands of the control socket.

`typed_json` converts both to JSON.  Sizes are in bytes.  Rates are in bytes a second;
None is as fast as the I/O of users allows.  Imports here are light, so that commands
start fast.
"""
