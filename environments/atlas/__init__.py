"""The atlas: an embedded search world from real data, flags in photos and facts behind search."""
