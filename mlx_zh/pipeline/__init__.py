"""The pipeline of a run: the steps that a recipe has, which of them are out of date, and running them."""
