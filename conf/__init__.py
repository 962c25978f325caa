"""Settings, table declarations and error types: what every other room of the house may import."""
