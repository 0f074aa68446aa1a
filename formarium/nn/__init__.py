"""Building blocks that two or more systems share. A block knows no system and no task."""
