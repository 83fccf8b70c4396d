"""Benchmarks of the field as question rows: published schemas, pictures, and where they lie.

Start with `registry`; a schema is a function on one published row (`schemas`), a picture is decoded
only when its question is asked (`pictures`).
"""
