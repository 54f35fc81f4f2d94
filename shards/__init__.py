"""The on-disk format and its stream: write, read, verify, sample, assemble.

writer -> shard-NNNNNN.tar + index.arrow + dataset.json -> reader -> sampler -> timeline -> assembly -> stream -> Batch
"""
