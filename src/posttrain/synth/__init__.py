"""Making data: rows with their provenance."""
