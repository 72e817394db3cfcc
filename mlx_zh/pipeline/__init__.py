"""From a recipe to its report: which stages a run has, which are out of date, and running them."""
