"""Images: reading, writing and preparing them."""
