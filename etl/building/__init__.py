"""A build, step by step: filters, plan, shards, pipeline, gathering, and what it shows on the way."""
