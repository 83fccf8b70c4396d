"""The door: the console script, its verbs, and the scripts that start a training."""
