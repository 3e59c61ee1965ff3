"""The compiled library of all kernels: `build` compiles it and needs no PyTorch in Python (setup.py
uses it), `loader` finds it and loads it into PyTorch.
"""
