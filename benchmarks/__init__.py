"""The speed and memory of our networks beside those of other packages."""
