"""Optimal transport: plans and maps that move mass cheaply, and what regularizes them."""
