"""The search: space, samplers, budgets, the three stages, the study on disk, the report."""
