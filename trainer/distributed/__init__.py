"""Communication of ranks: their environment, values from rank 0, agreement before the first step."""
