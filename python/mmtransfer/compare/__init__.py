"""Comparisons of methods on one task: accuracy and cost, as a table, a page and a record."""
