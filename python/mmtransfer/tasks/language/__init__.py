"""Language models under the task of texts: their tokens, their embedding table, and the two heads."""
