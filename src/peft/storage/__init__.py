"""Files on disk and on the hub. Knows nothing of models, methods or layers."""
