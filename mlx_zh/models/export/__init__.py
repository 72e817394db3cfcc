"""From base and adapter to files that other programs load."""
