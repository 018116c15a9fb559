"""What the commands of the control socket are asked, and what they answer.

`typed_json` makes the JSON of both.  Sizes are in bytes, rates in bytes a second,
None for as fast as users' own I/O allows.  Nothing heavy is imported here: commands
start fast.
"""
