"""From a bandit to REINFORCE, and what regularizes it."""
