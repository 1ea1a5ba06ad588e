"""Plan: index -> packs -> global steps -> ranks, as pure functions of (index, seed, epoch).

sources, catalog    what a recipe names -> lengths and places, read from indexes row group by row group
blend, order        several datasets as one shuffled sequence
oversize            samples that fit no pack
packing, exchange   packs even in tokens and pixels, with almost no padding
window, steps       the packs of a window; steps of packs of like cost, and their deal to ranks
epoch               EpochPlan: all of it
cost, forecast      what an epoch costs, and what is known of it before it starts
"""

from omnidata.plan.epoch import EpochPlan

__all__ = ["EpochPlan"]
