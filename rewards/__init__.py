"""Rewards of search trajectories: pure functions on plain data; start with `rewards.compose`."""
