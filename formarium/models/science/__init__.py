"""Models of science: operators, equations, meshes, spectra."""
