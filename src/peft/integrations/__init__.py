"""Bridges to the world outside the model: files, the hub, offloading, parallelism. The house's core imports none at start."""
