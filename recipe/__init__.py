"""What trained the pocket model and the judge of the laboratory; it stands on benchmarks/."""
