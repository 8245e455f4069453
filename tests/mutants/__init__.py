"""One-line breakages of the product, each with the test that must see it."""
