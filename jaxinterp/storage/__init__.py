"""What a run keeps on disk: the only Orbax code of the project."""
