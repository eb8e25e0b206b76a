"""Growth laws learned from images, and the terms they become."""
