"""YAML with line numbers, lengths and sizes as people write them, and error messages about recipes."""
