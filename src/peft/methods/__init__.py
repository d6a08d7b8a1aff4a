"""One file a method: its config, its parameters with shapes, its formula."""
