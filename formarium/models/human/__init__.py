"""People: poses, meshes."""
