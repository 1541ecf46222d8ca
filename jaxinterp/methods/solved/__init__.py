"""Methods without training: moments of a stream, or the weights themselves, and one solution in float64."""
