"""Image restoration: super-resolution, denoising, artefact removal, deblurring."""
