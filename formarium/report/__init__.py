"""Reports: one HTML file that works offline. Plain data, figures and pictures in; nothing here runs a model."""
