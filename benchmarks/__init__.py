"""Speed and memory of this package beside those of other packages."""
