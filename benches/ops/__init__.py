"""One bench file for each op."""
