"""Six learners as unlike as the course is: the examples of the contract, and what the conformance suite runs on."""
