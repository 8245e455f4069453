"""Making models smaller, and saying by how much and at what price."""
