"""Models of video: generation, prediction, completion."""
