"""One bench file for each method of the papers."""
