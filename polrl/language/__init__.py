"""Language models: what reinforcement learning adds to them, and what keeps it in bounds."""
