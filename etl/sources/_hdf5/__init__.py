"""HDF5 files of unknown origin: tried first by a process that may die of them, then read a band of rows at a time.

files -> `tried`: a child process opens each and touches all that describes its contents -> what is wrong with it
dataset -> `Rows`: bands of whole chunks, unpacked here -> rows [start, stop)

libhdf5 believes what it reads: damaged bytes can crash it, keep it busy forever or make it ask for any memory. So
everything that it parses is parsed once in the child, under a limit of time and of memory. Chunks of the plain kind
(native types, gzip, shuffle) are not libhdf5's to unpack: that is where a chunk shorter than its shape kills it, and
doing it here is twice as fast. Other filters, and values of variable length, are read by libhdf5, in the child too.

Invariant: rows equal what h5py gives, or an exception of DAMAGE says that the bytes make no sense.
"""

from etl.sources._hdf5.dataset import (
    AGAIN,
    DAMAGE,
    VALUES,
    Dataset,
    corrupt,
    damage,
    dataset,
    holds,
    member,
    stores_rows,
    values,
)
from etl.sources._hdf5.rows import Rows
from etl.sources._hdf5.trial import opened, tried

__all__ = [
    "AGAIN", "DAMAGE", "VALUES", "Dataset", "Rows", "corrupt", "damage", "dataset", "holds", "member", "opened",
    "stores_rows", "tried", "values",
]  # fmt: skip
