"""Chapter 07: offline reinforcement learning, from a fixed set of transitions that somebody else recorded."""
