"""Measuring file systems side by side: `fusestore bench`, also as `tools/bench`.

`workloads` and `store_workloads` say what is measured, `targets` where (a store
of its own, the null daemon, any directory), `rounds` how often and in which
order, `report` and `plot` how it reads.
"""
