"""Methods that train what changes a model: transport maps, rotations, steering vectors."""
