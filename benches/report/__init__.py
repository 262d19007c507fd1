"""Tables, figures and pages of recorded results."""
