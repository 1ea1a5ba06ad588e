"""Loader: packs -> microbatches, the same ones for any number of ranks and workers.

reader              a sample by one ranged read           sample_bytes.py; remote.py, cache.py for URLs
assembler           documents -> tensors, in workers      augment.py changes pictures reproducibly
workers             processes that assemble ahead; buffers.py lends them memory for pictures
microbatch          what one rank feeds to one forward and backward
loader              PackLoader: the plan's order, and a state of a few integers
wds                 the same shards as a plain webdataset pipeline
"""

from omnidata.loader.loader import PackLoader
from omnidata.loader.microbatch import Microbatch

__all__ = ["Microbatch", "PackLoader"]
