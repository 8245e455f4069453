"""Models made smaller, and written in the forms that other programs read."""
