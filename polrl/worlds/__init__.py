"""The problems that methods learn on: tabular worlds, bandits, control tasks and data sets."""
