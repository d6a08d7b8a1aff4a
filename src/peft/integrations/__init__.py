"""Bridges to the world outside the model: files, the hub, other libraries, several devices."""
