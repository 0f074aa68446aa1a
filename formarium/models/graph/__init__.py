"""Systems that read graphs."""
