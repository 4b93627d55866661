"""What runs came to: the papers' tables beside ours, pictures, one page."""
