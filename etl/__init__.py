"""Logs in, shards out: sources (one file per format), tokenizers (one per modality), a Beam pipeline."""
