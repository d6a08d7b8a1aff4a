"""What every method stands on: adapters, the adapted layer, injection, merging and files. Knows no method by name."""
