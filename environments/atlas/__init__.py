"""The atlas: an embedded search world of flags seen in photos and facts behind text search, from real data."""
