"""The laboratory: what the tempering does to pictures, measured where ground truth is known."""
