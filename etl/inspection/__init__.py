"""Looking into a dataset: tokens decoded and counted, for `python -m etl.inspect`."""
