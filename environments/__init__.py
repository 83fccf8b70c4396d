"""Search environments: dialects, tools, episodes, and the embedded world `atlas`."""
