"""Models that take sound: recognition, separation, super-resolution."""
