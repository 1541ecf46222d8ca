"""Causes: patch, attribute, find circuits, steer, and tell what each claim is worth."""
