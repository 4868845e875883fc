"""Optimizers that PyTorch does not have, or not in this form; parts like `torch.optim`'s own.

Their states are tensors of the parameter's shape, so that checkpoints hold them as any other.
"""
