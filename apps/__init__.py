"""Programs: flags in, one library call, words out."""
