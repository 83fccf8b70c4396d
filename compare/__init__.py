"""The proof: run folders in, floor, ceiling, curves and a report out."""
