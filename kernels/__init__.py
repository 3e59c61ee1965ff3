"""Attention kernels: each folder holds a specification in plain PyTorch, the faster forms of it and
the interface that picks one.
"""
