"""Reinforcement learning of diffusion samplers, and what keeps it near the data."""
