"""How settings are read: kinds of values, YAML files and flags, rules between several of them."""
