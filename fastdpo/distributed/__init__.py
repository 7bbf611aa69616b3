"""Several processes: shards of the vocabulary, what ranks must agree on, DTensors, and tokens that travel to a head."""

from .shards import ROW_STATS, VocabShards

__all__ = ["ROW_STATS", "VocabShards"]
