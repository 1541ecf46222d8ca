"""The vocabulary that everything else is written in: names, errors, batches. It computes nothing."""
