"""What a network costs, and how signals travel through it."""
