"""Export: files for other programs, from a base model and an adapter."""
