"""What an uploaded file says of itself, read without torch and without running anything in it."""
