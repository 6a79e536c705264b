"""Quality of images."""
