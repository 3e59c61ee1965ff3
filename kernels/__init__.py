"""Fast forms of single operations: `window_attention` (a specification in plain PyTorch, the faster
forms of it and the interface that picks one), `linear` (products and the MLP), and `library`, which
compiles and loads what both call.
"""
