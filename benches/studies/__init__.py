"""Studies: questions about methods that take a table of runs to answer. Each is a script with a record."""
