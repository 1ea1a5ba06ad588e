"""Faults on purpose: `make faults` tries them all and prints one table; tests/test_faults.py a few of each.

    table.py          Row, the parts, the printed table: `python -m faults [--short] [PART ...]`
    disk.py           a shim under omnidata/durable.py: every operation seen, stopped, or lost with the power
    kills.py          kill -9 and a full disk at every durable operation, and at random
    power.py          what was not synced is gone
    building.py       what both share: a small build, stopped in a child and gone on with here
    damage.py         a shard, index and manifest that are cut, flipped, missing or exchanged
    mutants.py        the code made wrong on purpose: do the tests see it?
    training.py       a sample of kills and stops of training, in worlds of 1 to 3 ranks
    families.py       the same of transformers' own classes
    trials.py         the long form of both: `make trials`
    checkpoints.py    every file of a checkpoint damaged in every way, three restarts after each

Another part is a module with ``rows(folder, short) -> Iterator[Row]`` and a name in ``table.PARTS``.
"""
