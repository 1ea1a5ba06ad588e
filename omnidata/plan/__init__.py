"""Plan: index -> packs -> global steps -> ranks, as pure functions of (index, seed, epoch).

sources, catalog    what a recipe names -> lengths and places, read from indexes row group by row group
blend, order        several datasets as one shuffled sequence
oversize, packing   samples that fit no pack; packs of even cost with almost no padding
epoch               EpochPlan: windows, packs, steps, the deal to ranks
cost, forecast      what an epoch costs, and what is known of it before it starts
"""

from omnidata.plan.epoch import EpochPlan

__all__ = ["EpochPlan"]
