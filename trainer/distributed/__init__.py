"""What ranks need of each other: their environment, values from rank 0, agreement before the first step."""
