"""The networks that the methods share."""
