"""What configures, drives and records any learner, and knows no algorithm."""
