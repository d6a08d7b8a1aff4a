"""Tensor operations that carry the cost of training and serving adapters. They know tensors, not modules or configs."""
