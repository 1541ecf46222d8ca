"""What attention heads contribute to features, and discrete codes of what they write."""
