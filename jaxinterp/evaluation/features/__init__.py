"""What a feature fires on and what it writes."""
