"""Logs in, shards out: sources (one file a format), tokenizers (one a modality), a Beam pipeline."""
