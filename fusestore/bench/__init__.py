"""Measuring file systems side by side: `fusestore bench`, also as `tools/bench`.

`workloads` and `store_workloads` define the measurements.  `targets` defines the file
systems: a temporary store, the null daemon, any directory.  `rounds` defines how often
and in which order to measure.  `report` and `plot` format the results.
"""
