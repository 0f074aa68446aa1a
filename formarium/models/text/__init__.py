"""Models of text: reading it from images, generating it, understanding it."""
