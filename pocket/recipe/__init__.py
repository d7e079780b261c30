"""The code that made the pocket model's weights; running the program does not need it."""
