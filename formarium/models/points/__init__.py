"""Systems whose input is a cloud of points."""
