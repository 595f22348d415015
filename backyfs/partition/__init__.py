"""What the bytes of an image say, for which nobody vouches: its partition table (GPT or MBR), which
file systems there are, and whether they were unmounted.

Invariants, whatever the bytes: no exception, no partition outside of the disk, no two that
overlap, bounded work. A table that is damaged or lies yields no partitions and a reason: a slice
of the wrong bytes would be worse than none.
"""

from backyfs.partition.filesystem import recognise
from backyfs.partition.table import Table, parse

__all__ = ["Table", "parse", "recognise"]
