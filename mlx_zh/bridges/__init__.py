"""From other programs' projects: their settings as a recipe."""
