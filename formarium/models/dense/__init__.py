"""Dense prediction: detection and segmentation of images."""
