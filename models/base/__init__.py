"""What several families of backbones share: registry, base classes, what is read from a config."""
