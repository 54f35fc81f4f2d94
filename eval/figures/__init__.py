"""Figures of several comparisons together, beside the report that each of them writes."""
