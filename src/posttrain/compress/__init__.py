"""Making models smaller, saying by how much and at what price, and writing them in forms that other programs read."""
