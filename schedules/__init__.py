"""Kernels: the family protocol, the families of each target, and the choice among them."""
