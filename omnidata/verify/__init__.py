"""Verify: prove that a dataset is what its manifest says, or list everything that is not.

files, tables       quick: sizes, small files, whole columns of the tables
shard               deep: every byte of a shard                shard_walk.py reads it front to back
run                 runs them, in parallel; findings.py is what they report
repair              rebuilds what is only derived from intact shards
"""
